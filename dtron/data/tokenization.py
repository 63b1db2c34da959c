"""Tokenization: documents become one long array of token ids.

If the user gives no tokenizer, a byte-level BPE is trained on the documents. Its alphabet is the
256 bytes, so there is no unknown token, and decoding gives back every text exactly. The ids of all
documents are concatenated. Each document ends with the tokenizer's end token. The ids are stored as
raw integers and mapped into memory, so memory does not grow with the corpus. A start reads the file
once, for its checksum.

Tokenizer and ids are cached, under keys that name their inputs (`dtron.data.cache`). Left out:
normalisation and other tokenizer families. Make such a tokenizer with the `tokenizers` library and
give its tokenizer.json.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dtron.data.cache import SealedFile, cached, digest, read_sealed
from dtron.data.files import expand
from dtron.data.formats import one_line
from dtron.data.special_tokens import END, end_id
from dtron.data.tokenizer_library import library, read_tokenizer
from dtron.errors import UserError
from dtron.json_files import is_there

_PIECE = 1 << 20  # characters of one document encoded at once; a whole book needs too much memory
_BATCH = 1 << 22  # characters handed to the tokenizer's threads at once
# Characters to learn merges from. Merges settle much earlier, and counting costs memory.
_SAMPLE = 1 << 25
NO_TOKEN = "give one with an unknown token or a byte-level alphabet"


def get_tokenizer(path: str | None, docs: Iterable[str], vocab_size: int, cache: Path) -> Tokenizer:
    """Return the tokenizer.json at `path`, or (None) a byte-level BPE of at most `vocab_size`
    tokens for `docs`.

    The BPE learns from the first 32 million characters of `docs`, and is the same each time."""
    if path is not None:
        return load_tokenizer(path, vocab_size)
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + 1
    if vocab_size < smallest:
        raise UserError(
            f"--model.vocab {vocab_size} is too small for a byte-level tokenizer, which has a "
            f"token for each of 256 bytes and the end of text; set --model.vocab {smallest} or more"
        )
    target = cache / f"tokenizer-{digest([key_of(docs), str(vocab_size)])}.json"

    def write(file: Path) -> None:
        file.write_text(_train(docs, vocab_size).to_str(pretty=True), encoding="utf-8")

    return cached(target, _read_tokenizer, write)


def encode(
    docs: Iterable[str], tokenizer: Tokenizer, cache: Path, end: int | None = None
) -> np.ndarray:
    """Return all documents' ids, concatenated and read-only.

    Text that happens to spell a special token is encoded as ordinary text: only this function ends
    a document.

    `end`: the token that ends each document; None: the token that `end_id` finds in the vocabulary.
    If there is none, documents follow each other with nothing between them."""
    text, end = tokenizer.to_str(), end_id(tokenizer) if end is None else end
    dtype = np.dtype(np.uint16 if vocab_of(tokenizer) <= 1 << 16 else np.uint32)
    target = cache / f"tokens-{digest([key_of(docs), text, str(end)])}.{dtype}"
    read = partial(_read_tokens, dtype=dtype)
    write = partial(_write, docs=docs, tokenizer=text, end=end, dtype=dtype)
    return cached(target, read, write)


def key_of(docs: Iterable[str]) -> str:
    """Return the key of documents. Documents with files know their key without reading the files;
    any other iterable of strings is hashed."""
    return getattr(docs, "key", None) or digest(docs)


def vocab_of(tokenizer: Tokenizer) -> int:
    """Return the number of rows that an embedding needs. Ids may have gaps, so the number of tokens
    is not enough."""
    return max(tokenizer.get_vocab_size(), 1 + max(tokenizer.get_vocab().values(), default=-1))


def load_tokenizer(
    path: str, vocab_size: int | None = None, flag: str = "--data.tokenizer"
) -> Tokenizer:
    """Load the tokenizer.json at `path`, or in that folder. If `vocab_size` is given, the tokenizer
    may have at most `vocab_size` words."""
    file = expand(path)
    if path and is_there(file / "tokenizer.json"):
        file = file / "tokenizer.json"
    if not path or not is_there(file):
        raise UserError(
            f"{flag} {path!r} does not exist; give a tokenizer.json, or leave it out to train one"
        )
    try:
        tokenizer = read_tokenizer(file)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(
            f"{flag} {path!r} is not a valid tokenizer.json ({one_line(error)}); "
            "save one with `tokenizers`, or leave it out to train one"
        ) from error
    size = vocab_of(tokenizer)
    if vocab_size is not None and size > vocab_size:
        raise UserError(
            f"{flag} {path!r} has {size} tokens and the model only {vocab_size}; every token needs "
            f"a row in the embedding, so set --model.vocab {size}"
        )
    return tokenizer


def _train(docs: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_sample(docs), trainer)
    return tokenizer


def _sample(docs: Iterable[str]) -> Iterator[str]:
    left = _SAMPLE
    for piece, _ in _pieces(docs):
        yield piece[:left]
        left -= len(piece)
        if left <= 0:
            return


def _read_tokenizer(file: Path) -> Tokenizer | None:
    try:
        return read_tokenizer(file)
    except Exception:
        return None


def _pieces(docs: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Yield documents, split into segments of at most `_PIECE` characters, after a line where
    possible; True with the last segment of a document.

    No merge crosses a split, so about one token in a million characters differs from an encoding of
    the whole document."""
    for text in docs:
        start = 0
        while len(text) - start > _PIECE:
            stop = text.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
            yield text[start:stop], False
            start = stop
        yield text[start:], True


def _batches(docs: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    batch, size = [], 0
    for piece in _pieces(docs):
        batch.append(piece)
        size += len(piece[0])
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def encoder_of(tokenizer: Tokenizer | str, special: bool = False) -> Tokenizer:
    """Return a copy that neither truncates nor pads.

    ``special``: whether special tokens that are spelled out in a text become special tokens.
    Otherwise they are plain text."""
    text = tokenizer if isinstance(tokenizer, str) else tokenizer.to_str()
    with library("the tokenizer does not survive being saved", "give a sound tokenizer.json"):
        encoder = Tokenizer.from_str(text)  # a copy: the caller's tokenizer keeps its settings
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = not special
    return encoder


def ids_of(encoder: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the ids of each text. Raises UserError if the tokenizer has no token for something in
    it."""
    with library("--data.tokenizer cannot encode the documents", NO_TOKEN):
        return [e.ids for e in encoder.encode_batch_fast(texts, add_special_tokens=False)]


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the text of ids."""
    with library("the tokenizer cannot decode ids", "give one with another decoder"):
        return tokenizer.decode(ids)


def encoded(
    docs: Iterable[str], encoder: Tokenizer, end: int | None, dtype: np.dtype
) -> Iterator[tuple[np.ndarray, bool]]:
    """Yield the ids of documents, in segments. True with the last segment of each document, which
    the end token follows."""
    closing = [] if end is None else [end]
    for batch in _batches(docs):
        found = ids_of(encoder, [piece for piece, _ in batch])
        for (_, last), ids in zip(batch, found, strict=True):
            yield np.array(ids + closing if last else ids, dtype), last


def _write(
    file: Path, docs: Iterable[str], tokenizer: str, end: int | None, dtype: np.dtype
) -> None:
    """Write the ids as raw `dtype`, sealed."""
    with SealedFile(file) as out:
        for ids, _ in encoded(docs, encoder_of(tokenizer), end, dtype):
            out.write(ids.tobytes())


def _read_tokens(file: Path, dtype: np.dtype) -> np.ndarray | None:
    ids = read_sealed(file)
    return None if ids is None or len(ids) % dtype.itemsize else ids.view(dtype)
