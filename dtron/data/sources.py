"""Where samples come from: each source is a pure function from the number of a sample to the
sample.

A run takes samples 0, 1, 2, ... and its place in the data is how many it has taken, one integer.
What sample i is depends on nothing but the source's own choices (its files, sequence length, seed):
not on the mesh, the micro-batch or what was read before. So global batch n is ``rows(n * B, B)`` on
any number of devices, and a resumed run goes on with exactly the next sample. No source ends: when
all its samples are taken it begins another epoch.

Here are the sources made of long lines of tokens: ``Chunks`` of text, ``Packed`` for indexed files,
and ``Mixed`` of others. ``fit`` packs whole documents, ``stream`` reads text as it goes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Protocol

import numpy as np

from dtron.data.cache import digest
from dtron.data.chunks import begin_ids, document_ids, rows
from dtron.data.indexed import Indexed
from dtron.data.megatron_order import Order, in_order, make_order
from dtron.data.mixture import Blend
from dtron.errors import UserError


@dataclass(frozen=True, eq=False)
class Rows:
    """Samples: ``tokens`` int64 [B, S + 1], S inputs and, shifted by one, S targets. ``documents``
    and ``positions`` [B, S]: which document of its row each input is in, and its place there; None
    where nobody asked. ``counted`` bool [B, S]: which targets are part of the loss; None: all."""

    tokens: np.ndarray
    documents: np.ndarray | None = None
    positions: np.ndarray | None = None
    counted: np.ndarray | None = None

    @property
    def valid(self) -> int:
        """How many targets count."""
        return self.tokens[:, 1:].size if self.counted is None else int(self.counted.sum())

    def filled(self, multiple: int) -> Rows:
        """The same and empty rows, of which nothing counts, up to a multiple."""
        more = -len(self.tokens) % multiple
        if not more:
            return self
        counted = np.ones_like(self.tokens[:, 1:], bool) if self.counted is None else self.counted
        rows = Rows(self.tokens, self.documents, self.positions, counted)
        return _each(rows, lambda x: np.concatenate([x, np.zeros((more, x.shape[1]), x.dtype)]))


def _each(rows: Rows, fn) -> Rows:
    values = [getattr(rows, field.name) for field in fields(rows)]
    return Rows(*(None if value is None else fn(value) for value in values))


class Source(Protocol):
    size: int
    """tokens of one epoch"""

    def __len__(self) -> int:
        """Samples of one epoch."""

    def rows(self, start: int, count: int) -> Rows:
        """Samples ``start`` to ``start + count`` of the run."""

    def digest(self) -> str:
        """Tells sources apart that give other samples."""


def check_vocab(tokens: np.ndarray, vocab: int | None, where: str) -> None:
    """Raise UserError for an id that a model of ``vocab`` words (None: any) has not."""
    if vocab is None or not tokens.size or 0 <= tokens.min() <= tokens.max() < vocab:
        return
    wrong = tokens.max() if tokens.max() >= vocab else tokens.min()
    raise UserError(
        f"{where} holds the token id {wrong}, and the model has ids from 0 to {vocab - 1}; set --model.vocab "
        "to that of the tokenizer it was made with"
    )


class Chunks:
    """A long array of tokens, cut into chunks; every epoch has its own order of them (``loader.rows``).
    ``end``: the token that ends a document, for ``marks``: whether to say where documents are."""

    def __init__(
        self,
        tokens: np.ndarray,
        sequence: int,
        seed: int,
        end: int | None,
        marks: bool,
        shuffle: bool = True,
    ) -> None:
        self.tokens, self.sequence, self.seed, self.shuffle = tokens, sequence, seed, shuffle
        self.end, self.marks, self.size = end, marks, len(tokens)

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.sequence

    def rows(self, start: int, count: int) -> Rows:
        out = rows(self.tokens, self.sequence, self.seed, start, count, self.shuffle)
        return Rows(out, *(document_ids(out[:, :-1], self.end) if self.marks else ()))

    def digest(self) -> str:
        """By size and the tokens at both ends."""
        ends = [
            np.ascontiguousarray(part).tobytes()
            for part in (self.tokens[:65536], self.tokens[-65536:])
        ]
        return digest([f"chunks {self.size} {self.sequence}", *ends])


class Packed:
    """Sequences ``first`` to ``last`` of an indexed corpus in the order of Megatron's GPTDataset
    (``order``) for a run of ``samples``. A run that goes on beyond the order begins another, of the
    next seed.

    Every token read is checked against ``vocab``: a ValueError names the first that is not below
    it.
    """

    def __init__(
        self,
        data: Indexed,
        first: int,
        last: int,
        sequence: int,
        seed: int,
        samples: int,
        vocab: int,
        marks: bool,
        shuffle: bool = True,
    ):
        self.data, self.bounds, self.sequence, self.seed = data, (first, last), sequence, seed
        self.samples, self.vocab, self.marks, self.shuffle = samples, vocab, marks, shuffle
        self.size = int(data.lengths[first:last].sum(dtype=np.int64))
        self._made = lru_cache(maxsize=2)(self._make)

    def _make(self, number: int) -> Order:
        ids = np.arange(*self.bounds)
        if not self.shuffle:
            return in_order(self.data.lengths, ids, self.sequence)
        return make_order(self.data.lengths, ids, self.sequence, self.samples, self.seed + number)

    def __len__(self) -> int:
        return (self.size - 1) // self.sequence

    def rows(self, start: int, count: int) -> Rows:
        n = len(self._made(0))
        out = np.empty((count, self.sequence + 1), np.int64)
        begins = np.zeros(out.shape, bool) if self.marks else None
        row = 0
        while row < count:
            number, place = divmod(start + row, n)
            some = min(count - row, n - place)
            part = slice(row, row + some)
            order = self._made(number if self.shuffle else 0)
            self._fill(order, order.shuffle[place : place + some], out[part])
            if self.marks:
                self._begin(order, order.shuffle[place : place + some], begins[part])
            row += some
        check_vocab(out, self.vocab, repr(str(self.data.bin)))
        return Rows(out, *(begin_ids(begins[:, :-1]) if self.marks else ()))

    def _fill(self, order: Order, samples: np.ndarray, out: np.ndarray) -> None:
        tokens, starts, lengths = self.data.tokens, self.data.starts, self.data.lengths
        width = self.sequence + 1
        ats, insides = order.place(samples.astype(np.int64) * self.sequence)
        for row, at, inside in zip(out, ats.tolist(), insides.tolist(), strict=True):
            filled = 0
            while filled < width:
                document = order.documents[at]
                first = int(starts[document]) + inside
                some = min(int(lengths[document]) - inside, width - filled)
                row[filled : filled + some] = tokens[first : first + some]
                filled, at, inside = filled + some, at + 1, 0

    def _begin(self, order: Order, samples: np.ndarray, begins: np.ndarray) -> None:
        """Mark the first token of each document in each row: where the one ahead of it ends."""
        for row, first in zip(begins, samples.astype(np.int64) * self.sequence, strict=True):
            low, high = np.searchsorted(order.ends, [first, first + self.sequence], side="right")
            row[order.ends[low:high] - first] = True

    def digest(self) -> str:
        """By the sizes of the files, which part of them, and the tokens at both ends."""
        tokens = self.data.tokens
        sizes = f"{len(self.data)} {len(tokens)} {self.size} {self.bounds} {self.sequence}"
        return digest([f"packed {sizes}", tokens[:65536].tobytes(), tokens[-65536:].tobytes()])


class Mixed:
    """Samples of several sources by weight, interleaved by the greedy rule (``mixture``)."""

    def __init__(self, sources: list[Source], weights: list[float]) -> None:
        self.sources, self.blend = sources, Blend(weights)
        self.size = sum(source.size for source in sources)

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def rows(self, start: int, count: int) -> Rows:
        before, chosen = self.blend.choose(start, count)
        where = [np.flatnonzero(chosen == number) for number in range(len(self.sources))]
        parts = [
            s.rows(n, len(places)) for s, n, places in zip(self.sources, before, where, strict=True)
        ]
        back = np.argsort(np.concatenate(where))
        return _each(_together(parts), lambda x: x[back])

    def digest(self) -> str:
        weights = " ".join(map(repr, self.blend.weights))
        return digest([f"mixed {weights}", *(source.digest() for source in self.sources)])


def _together(parts: list[Rows]) -> Rows:
    counted = [part.counted for part in parts]
    if any(c is not None for c in counted):  # what counts everywhere beside what does not
        counted = [
            np.ones_like(p.tokens[:, 1:], bool) if p.counted is None else p.counted for p in parts
        ]
        parts = [
            Rows(p.tokens, p.documents, p.positions, c) for p, c in zip(parts, counted, strict=True)
        ]
    columns = zip(
        *([getattr(part, field.name) for field in fields(Rows)] for part in parts), strict=True
    )
    return Rows(*(None if column[0] is None else np.concatenate(column) for column in columns))
