"""The ids of a conversation, and which of them are learned.

**One call.** A tokenizer is called once, on the whole text. A tokenizer of the Metaspace or the
Prepend kind writes a ▁ at the beginning of every text that it is given. Pieces that are encoded
one by one would have a ▁ at the beginning of each.

**Learned tokens.** The tokenizer reports the characters of each token. A token is learned if one of
its visible characters is learned. White space decides only in a token of nothing else. So the token
``Ġ4`` is learned if the answer is ``4`` and the space before it is the prompt's, because a model
must write this token. The first token after an answer that ends in a space is not learned. Several
tokens may be of one character: the bytes of an emoji, or a lone ▁ and the character after it.
They are learned together.

**Sealed special tokens.** Where dtron writes the markers itself, no message may spell one. `sealed`
renames all special tokens of a tokenizer, with their ids, to names that begin with a character that
no message has. Only dtron writes these names. A ``<|im_end|>`` in a message is then plain text like
any other, even in a vocabulary whose pieces include it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from dtron.data.chat_samples import END, START, ChatSample
from dtron.data.chat_template import Span
from dtron.data.tokenization import NO_TOKEN, encoder_of
from dtron.data.tokenizer_library import library

_SPACES = np.array([c for c in range(0x3001) if chr(c).isspace()], np.uint32)
_PRIVATE = range(0xF0000, 0xFFFFE)  # a plane of Unicode without assigned characters


def offsets_encoder(tokenizer: str) -> Tokenizer:
    """Return a tokenizer, given as JSON, without its post-processor. A post-processor adds special
    tokens, and may take the white space of a token out of the token's offsets."""
    parts = {**json.loads(tokenizer), "post_processor": None}
    return encoder_of(json.dumps(parts), special=True)


def signed_ids(encoder: Tokenizer, samples: Sequence[ChatSample]) -> list[np.ndarray]:
    """Return the ids of each sample, as ``~id`` if they are not learned.

    ``encoder``: from `offsets_encoder` or `sealed`. Raises UserError if the tokenizer has no token
    for something in a text."""
    with library("--data.tokenizer cannot encode the conversations", NO_TOKEN):
        found = encoder.encode_batch([s.text for s in samples], add_special_tokens=False)
    out = []
    for sample, encoding in zip(samples, found, strict=True):
        ids = np.array(encoding.ids, np.int64)
        learned = learned_tokens(sample.text, sample.learned, encoding.offsets)
        out.append(np.where(learned, ids, ~ids))
    return out


def learned_tokens(
    text: str, spans: Iterable[Span], offsets: Sequence[tuple[int, int]]
) -> np.ndarray:
    """Return for each token whether it is learned.

    ``spans``: the learned stretches of the text.
    ``offsets``: where each token begins and ends in the text."""
    if not offsets:
        return np.zeros(0, bool)
    visible = ~np.isin(np.frombuffer(text.encode("utf-32-le"), np.uint32), _SPACES)
    learned = np.zeros(len(text), bool)
    for start, stop in spans:
        learned[start:stop] = True
    starts, stops = np.array(offsets).T
    # A token without characters belongs to the character after it.
    stops = np.minimum(np.maximum(stops, starts + 1), len(text))

    def any_of(flags: np.ndarray) -> np.ndarray:
        before = np.concatenate([[0], np.cumsum(flags)])
        return before[stops] > before[starts]

    return np.where(any_of(visible), any_of(visible & learned), any_of(learned))


# ---------------------------------------------------------------------------- sealed markers


def unused_character(texts: Iterable[str]) -> str:
    """Return a private character that none of the texts has."""
    used = {c for text in texts if not text.isascii() for c in text}
    return next(c for c in map(chr, _PRIVATE) if c not in used)


@lru_cache(maxsize=4)
def sealed(tokenizer: str, private: str) -> tuple[Tokenizer, str, str]:
    """Return a copy of a tokenizer that encodes a spelled special token as plain text, and the two
    markers as it knows them.

    ``tokenizer``: as JSON.
    ``private``: a character that no text has. The markers have it, if the tokenizer has tokens for
    them."""
    parts = json.loads(tokenizer)
    names = {
        token["content"]: f"{private}{token['id']}{private}"
        for token in parts["added_tokens"]
        if token["special"] or token["content"] in (START, END)
    }
    for token in parts["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    _rename(parts["model"], names)
    encoder = offsets_encoder(json.dumps(parts))
    return encoder, names.get(START, START), names.get(END, END)


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """Rename entries of a model's vocabulary. Merges of these entries go, so text has none."""
    if isinstance(vocab := model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in vocab.items()}
    else:  # a Unigram model: pieces with scores
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _makes(merge, names)]


def _makes(merge: str | list[str], names: dict[str, str]) -> bool:
    """Whether a merge has one of the pieces, or makes it."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return bool({left, right, left + right} & names.keys())
