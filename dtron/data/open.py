"""Opens the data that the command line names, for training and for validation: ``open_data``.

``--data.path`` names one source or several with weights. Each source is text (encoded once and
cached, or streamed), conversations, or a pair of indexed files. Each source gives a training and a
validation split, and all sources share one tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from dtron.data.answers import Answers
from dtron.data.best_fit_packing import Fitted, TokenizedDocuments
from dtron.data.cache import cache_dir, digest
from dtron.data.chat import Chats
from dtron.data.chat_rows import learned_rows
from dtron.data.chunks import check_length, split_text
from dtron.data.documents import Documents
from dtron.data.files import expand
from dtron.data.indexed import Indexed, prefix_of
from dtron.data.megatron_order import most_samples, split_documents
from dtron.data.mixture import parse_sources, samples_of
from dtron.data.sources import Chunks, Mixed, Packed, Source
from dtron.data.special_tokens import end_id
from dtron.data.stream import HELD, Stream
from dtron.data.tokenization import encode, get_tokenizer, key_of, load_tokenizer, text_of
from dtron.errors import UserError

if TYPE_CHECKING:
    from dtron.data.config import DataConfig

Text = Documents | Chats | Indexed


@dataclass(frozen=True, eq=False)
class Data:
    """The data of a run.

    ``train``, ``validation``: the samples.
    ``tokenizer``: None if it is not known, for indexed files.
    ``samples``: the largest number of samples that has this run's order, if the order depends on
    this number.
    ``notes``: lines about what is left out: files, conversations, end tokens.
    ``end``: the id of the token that ends a document; None: there is none."""

    train: Source
    validation: Source
    tokenizer: Tokenizer | None
    samples: int | None = None
    notes: tuple[str, ...] = ()
    end: int | None = None

    def digest(self) -> str:
        """Return a hash that differs if the samples or the tokens differ."""
        text = "" if self.tokenizer is None else self.tokenizer.to_str()
        return digest([self.train.digest(), self.validation.digest(), text])

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids)) if self.tokenizer is None else text_of(self.tokenizer, ids)


def open_data(
    d: DataConfig, vocab: int, seed: int, samples: int, cache: Path | None = None
) -> Data:
    """Open the data that ``--data.*`` names, for a run of ``samples`` samples. Raises UserError if
    the data cannot be read, is too short for one sample, or has ids that a model of ``vocab`` words
    does not have."""
    cache = cache if cache is not None else cache_dir()
    samples = d.samples or samples
    named = parse_sources(d.path)
    texts = [_open(d, path, cache) for _, path in named]
    _check_order(d, texts)
    tokenizer, file = _tokenizer(d, texts, vocab, cache)
    end = None if tokenizer is None else _end_id(d, tokenizer, file, texts)
    notes = [text.skipped for text in texts if not isinstance(text, Indexed)]
    if end is None and any(isinstance(text, Documents) for text in texts):
        notes.append(
            f"the tokenizer {str(file)!r} has no token that ends a document, so documents follow "
            "each other with nothing between them; name one by --data.end-token"
        )
    found: list[tuple[Source, Source]] = []
    most = None
    for (weight, _), text in zip(named, texts, strict=True):
        share = samples_of(weight, samples, len(named) == 1)
        if isinstance(text, Indexed):
            train, held, most = _indexed(d, text, seed, share, vocab)
            found.append((train, held))
            continue
        assert tokenizer is not None  # only indexed files may lack one
        if isinstance(text, Chats):
            train, held, note = learned_rows(d, text, text.encode(tokenizer, cache, end), seed)
            found.append((train, held))
            notes += [*text.notes, note]
        elif d.streaming:
            held = Stream(text, tokenizer, d.seq_len, d.marked, 0, HELD, end)
            found.append((Stream(text, tokenizer, d.seq_len, d.marked, HELD, 0, end), held))
        else:
            tokens = encode(text, tokenizer, cache, end)
            found.append(_text(d, tokens, end, seed))
    lines = tuple(line for line in notes if line is not None)
    if len(found) == 1:
        return Data(*found[0], tokenizer, most, lines, end)
    weights = [weight for weight, _ in named]
    train, held = (Mixed(list(sources), weights) for sources in zip(*found, strict=True))
    ordered = any(isinstance(text, Indexed) for text in texts)
    return Data(train, held, tokenizer, samples if ordered else None, lines, end)


def _end_id(
    d: DataConfig, tokenizer: Tokenizer, file: Path | None, texts: list[Text]
) -> int | None:
    """Return the end token. Raises UserError if documents need one and the tokenizer lacks it."""
    plain = any(isinstance(text, Documents) for text in texts)
    chats = any(isinstance(text, Chats) and text.template is None for text in texts)
    try:
        end = end_id(tokenizer, file, d.end_token)
    except UserError:
        if d.end_token is None and not (plain or chats):
            return None  # an index knows its documents, and a chat template ends its conversations
        raise
    if end is None and d.marked and plain:
        flag = "--data.packing best-fit" if d.fitted else "--data.document-mask"
        raise UserError(
            f"{flag}: the tokenizer {str(file)!r} has no token that ends a document; name one of "
            f"its tokens by --data.end-token, or drop {flag}"
        )
    return end


def _check_order(d: DataConfig, texts: Sequence[Text]) -> None:
    """Raise UserError for a flag of the order of indexed files, if no source is indexed."""
    for flag, value in (("--data.split", d.split), ("--data.samples", d.samples)):
        if value is not None and not any(isinstance(text, Indexed) for text in texts):
            raise UserError(
                f"{flag} {value} with --data.path {d.path}: is for .bin/.idx pairs; leave it out"
            )


def _open(d: DataConfig, path: str | None, cache: Path) -> Text:
    prefix = None if path is None else prefix_of(path)
    if (
        path is not None
        and prefix
        and (Path(path).suffix in (".bin", ".idx") or not expand(path).is_file())
    ):
        if d.chat or d.kind != "documents":
            flag = "--data.chat" if d.chat else f"--data.kind {d.kind}"
            raise UserError(
                f"{flag} with --data.path {path!r}: tokens have no roles; give a .jsonl"
            )
        return Indexed(prefix)
    if d.kind != "documents":
        return Answers(path, d.fields, d.tokenizer, d.end_token)
    if d.chat:
        return Chats(path, d.column or "messages", d.tokenizer, d.end_token)
    return Documents(path, d.column or "text", cache, d.streaming)


def beside(prefix: Path) -> Path:
    """Return the path of the tokenizer that ``prepare`` leaves beside its files."""
    return prefix.with_name(prefix.name + ".tokenizer.json")


def _tokenizer(
    d: DataConfig, texts: list[Text], vocab: int, cache: Path
) -> tuple[Tokenizer | None, Path | None]:
    """Return the tokenizer, and its file or folder if it has one."""
    files = {beside(text.prefix) for text in texts if isinstance(text, Indexed)}
    docs = [text for text in texts if not isinstance(text, Indexed)]
    if d.tokenizer is not None or not files:
        text = docs[0] if len(docs) == 1 else Turns(docs)
        file = None if d.tokenizer is None else Path(d.tokenizer)
        return get_tokenizer(d.tokenizer, text, vocab, cache), file
    there = [file for file in files if file.is_file()]
    ends = {end_id(load_tokenizer(str(file)), file) for file in there} if docs else set()
    known = {file.read_bytes() for file in there}
    if len(known) > 1 or len(ends) > 1 or (docs and len(there) < len(files)):
        raise UserError(
            f"--data.path {d.path!r}: its sources were made with different or unknown tokenizers; "
            "make them with one, and give it as --data.tokenizer"
        )
    if not there:
        return None, None
    return get_tokenizer(str(there[0]), [], vocab, cache), there[0]


class Turns:
    """Documents of several sources, interleaved, for training a tokenizer."""

    def __init__(self, docs: Sequence[Documents | Chats]) -> None:
        self.docs, self.key = docs, digest([key_of(part) for part in docs])

    def __iter__(self) -> Iterator[str]:
        turns = zip_longest(*self.docs)
        return (text for turn in turns for text in turn if text is not None)


def _text(d: DataConfig, tokens: np.ndarray, end: int | None, seed: int) -> tuple[Source, Source]:
    train, held = split_text(tokens, d.seq_len, d.validation_ratio)
    if d.fitted:
        assert end is not None  # _end_id refuses a tokenizer without one
        return (
            Fitted(_documents(train, end), d.seq_len, seed),
            Fitted(_documents(held, end), d.seq_len, seed, shuffle=False),
        )
    return (
        Chunks(train, d.seq_len, seed, end, d.marked),
        Chunks(held, d.seq_len, 0, end, d.marked, shuffle=False),
    )


def _documents(tokens: np.ndarray, end: int) -> TokenizedDocuments:
    """Find the documents in a text. Each includes its end token."""
    ends = np.flatnonzero(tokens == end) + 1
    if not len(ends) or ends[-1] < len(tokens):
        ends = np.append(ends, len(tokens))
    starts = np.concatenate([[0], ends[:-1]])
    return TokenizedDocuments(tokens, starts, ends - starts)


def _indexed(
    d: DataConfig, data: Indexed, seed: int, samples: int, vocab: int
) -> tuple[Source, Source, int | None]:
    if data.dtype.kind == "f":
        raise UserError(
            f"{str(data.idx)!r} has tokens of type {data.dtype}, and ids are whole numbers; {_MAKE}"
        )
    split = d.split if d.split is not None else f"{1 - d.validation_ratio},{d.validation_ratio}"
    (low, cut), (_, high), _ = split_documents(split, len(data))
    flag = "--data.validation-ratio" if d.split is None else "--data.split"
    for name, a, b in (("training", low, cut), ("validation", cut, high)):
        size = int(data.lengths[a:b].sum(dtype=np.int64))
        check_length(
            size, d.seq_len, f"{str(data.bin)!r} {name}", f", give it a larger share by {flag}"
        )
    train = Packed(data, range(low, cut), d.seq_len, seed, samples, vocab, d.marked)
    held = Packed(data, range(cut, high), d.seq_len, 0, 1, vocab, d.marked, shuffle=False)
    # A wrong tokenizer fails here, at the start. Every row is checked again when it is read.
    for source in (train, held):
        source.rows(0, min(len(source), 32))
    if not d.fitted:
        return train, held, most_samples(train.size, d.seq_len, samples)
    documents = TokenizedDocuments(data.tokens, data.starts, data.lengths)
    train = Fitted(documents.part(slice(low, cut)), d.seq_len, seed, vocab=vocab)
    held = Fitted(documents.part(slice(cut, high)), d.seq_len, seed, shuffle=False, vocab=vocab)
    return train, held, None


_MAKE = "make it with `python -m dtron.data prepare`"
