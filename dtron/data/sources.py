"""Sources of samples: each source is a pure function from a sample's number to the sample.

A run takes samples 0, 1, 2, ... Its place in the data is the number of samples taken, one integer.
Sample i depends only on the source's own choices (its files, sequence length, seed). It does not
depend on the mesh, the microbatch or earlier reads. So global batch n is ``rows(n * B, B)`` on any
number of devices, and a resumed run goes on with exactly the next sample. No source ends: when all
its samples are taken it begins another epoch.

This file has the sources that read one long sequence of tokens: ``Chunks`` for text, ``Packed`` for
indexed files, and ``Mixed`` for a mixture of other sources. ``best_fit_packing`` packs whole
documents. ``stream`` reads text during the run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from operator import itemgetter
from typing import Any, Protocol

import numpy as np

from dtron.data.cache import digest
from dtron.data.chunks import begin_ids, document_ids, rows
from dtron.data.indexed import Indexed
from dtron.data.mapped import check_uncut
from dtron.data.megatron_order import Order, in_order, make_order
from dtron.data.mixture import Blend
from dtron.errors import UserError


@dataclass(frozen=True, eq=False)
class Rows:
    """A batch of samples.

    ``tokens``: int64 [B, S + 1]; S inputs and, shifted by one, S targets.
    ``documents``, ``positions``: [B, S]; the document of its row that each input is in, and the
    input's position in this document. None if they were not requested.
    ``counted``: bool [B, S]; True for targets that are part of the loss. None: all targets are.
    ``crosses``: bool [B, S]; True for targets in another document than their input. None: unknown,
        or none of them counts."""

    tokens: np.ndarray
    documents: np.ndarray | None = None
    positions: np.ndarray | None = None
    counted: np.ndarray | None = None
    crosses: np.ndarray | None = None

    @staticmethod
    def marked(tokens: np.ndarray, documents: np.ndarray, positions: np.ndarray) -> Rows:
        """Make rows from the documents and positions of all tokens, [B, S + 1]."""
        crosses = documents[:, 1:] != documents[:, :-1]
        return Rows(tokens, documents[:, :-1], positions[:, :-1], crosses=crosses)

    def within_documents(self) -> Rows:
        """Return these rows without the targets that their input cannot know under a document mask:
        the first token of the next document."""
        if self.crosses is None:
            return self
        return replace(
            self, counted=~self.crosses & (True if self.counted is None else self.counted)
        )

    @property
    def valid(self) -> int:
        """Number of targets that are part of the loss."""
        return self.tokens[:, 1:].size if self.counted is None else int(self.counted.sum())

    def filled(self, multiple: int) -> Rows:
        """Return these rows, padded with empty rows to a multiple. No target of an empty row is
        part of the loss."""
        more = -len(self.tokens) % multiple
        if not more:
            return self
        counted = np.ones_like(self.tokens[:, 1:], bool) if self.counted is None else self.counted
        rows = replace(self, counted=counted)

        def pad(x: np.ndarray) -> np.ndarray:
            return np.concatenate([x, np.zeros((more, x.shape[1]), x.dtype)])

        return _map_rows(pad, rows)


def _map_rows(fn: Callable[[np.ndarray], np.ndarray], rows: Rows) -> Rows:
    """Apply ``fn`` to each array."""
    tokens, *marks = [getattr(rows, field.name) for field in fields(rows)]
    return Rows(fn(tokens), *(None if value is None else fn(value) for value in marks))


class Source(Protocol):
    """A source of samples. Epochs follow each other without end."""

    size: int
    """tokens of one epoch"""

    def __len__(self) -> int:
        """Return the number of samples of one epoch."""

    def rows(self, start: int, count: int) -> Rows:
        """Return samples ``start`` to ``start + count`` of the run."""

    def digest(self) -> str:
        """Return a hash that differs between sources with different samples."""


def check_vocab(tokens: np.ndarray, vocab: int | None, where: str) -> None:
    """Raise UserError for an id outside a vocabulary of ``vocab`` words (None: any id is valid)."""
    if vocab is None or not tokens.size or 0 <= tokens.min() <= tokens.max() < vocab:
        return
    wrong = tokens.max() if tokens.max() >= vocab else tokens.min()
    raise UserError(
        f"{where} holds the token id {wrong}, and the model has ids from 0 to {vocab - 1}; set "
        "--model.vocab to that of the tokenizer it was made with"
    )


class Chunks:
    """Samples from a long array of tokens, split into chunks. Every epoch has its own order of the
    chunks (``chunks.rows``).

    ``end``: the token that ends a document.
    ``marks``: whether to return documents and positions."""

    def __init__(
        self,
        tokens: np.ndarray,
        seq_len: int,
        seed: int,
        end: int | None,
        marks: bool,
        shuffle: bool = True,
    ) -> None:
        self.tokens, self.seq_len, self.seed, self.shuffle = tokens, seq_len, seed, shuffle
        self.end, self.marks, self.size = end, marks, len(tokens)

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def rows(self, start: int, count: int) -> Rows:
        check_uncut(self.tokens)
        out = rows(self.tokens, self.seq_len, self.seed, start, count, self.shuffle)
        return Rows.marked(out, *document_ids(out, self.end)) if self.marks else Rows(out)

    def digest(self) -> str:
        """Hash the size and the tokens at both ends."""
        ends = [
            np.ascontiguousarray(part).tobytes()
            for part in (self.tokens[:65536], self.tokens[-65536:])
        ]
        return digest([f"chunks {self.size} {self.seq_len}", *ends])


class Packed:
    """Samples from an indexed corpus, in the order of Megatron's GPTDataset (``megatron_order``)
    for a run of ``samples``. A run that goes beyond the order begins another order, with the next
    seed.

    ``sequences``: the sequences of the corpus to use.
    ``vocab``: every id must be below it. Reading another id raises UserError with this id.
    ``marks``: whether to return documents and positions.
    ``shuffle``: False for one epoch in the order of the file."""

    def __init__(
        self,
        data: Indexed,
        sequences: range,
        seq_len: int,
        seed: int,
        samples: int,
        vocab: int,
        marks: bool,
        shuffle: bool = True,
    ):
        self.data, self.sequences, self.seq_len, self.seed = data, sequences, seq_len, seed
        self.samples, self.vocab, self.marks, self.shuffle = samples, vocab, marks, shuffle
        self.size = int(data.lengths[sequences.start : sequences.stop].sum(dtype=np.int64))
        self._made = lru_cache(maxsize=2)(self._make)

    def _make(self, number: int) -> Order:
        ids = np.asarray(self.sequences)
        if not self.shuffle:
            return in_order(self.data.lengths, ids, self.seq_len)
        return make_order(self.data.lengths, ids, self.seq_len, self.samples, self.seed + number)

    def __len__(self) -> int:
        return (self.size - 1) // self.seq_len

    def rows(self, start: int, count: int) -> Rows:
        self.data.check_uncut()
        n = len(self._made(0))
        out = np.empty((count, self.seq_len + 1), np.int64)
        begins = np.zeros(out.shape, bool) if self.marks else None
        row = 0
        while row < count:
            number, place = divmod(start + row, n)
            some = min(count - row, n - place)
            part = slice(row, row + some)
            order = self._made(number if self.shuffle else 0)
            self._fill(order, order.shuffle[place : place + some], out[part])
            if begins is not None:
                self._begin(order, order.shuffle[place : place + some], begins[part])
            row += some
        check_vocab(out, self.vocab, repr(str(self.data.bin)))
        return Rows(out) if begins is None else Rows.marked(out, *begin_ids(begins))

    def _fill(self, order: Order, samples: np.ndarray, out: np.ndarray) -> None:
        tokens, starts, lengths = self.data.tokens, self.data.starts, self.data.lengths
        width = self.seq_len + 1
        ats, insides = order.place(samples.astype(np.int64) * self.seq_len)
        for row, at, inside in zip(out, ats.tolist(), insides.tolist(), strict=True):
            filled = 0
            while filled < width:
                document = order.documents[at]
                first = int(starts[document]) + inside
                some = min(int(lengths[document]) - inside, width - filled)
                row[filled : filled + some] = tokens[first : first + some]
                filled, at, inside = filled + some, at + 1, 0

    def _begin(self, order: Order, samples: np.ndarray, begins: np.ndarray) -> None:
        """Mark the first token of each document in each row: its place is the end of the document
        before it."""
        for row, first in zip(begins, samples.astype(np.int64) * self.seq_len, strict=True):
            low, high = np.searchsorted(order.ends, [first, first + self.seq_len], side="right")
            row[order.ends[low:high] - first] = True

    def digest(self) -> str:
        """Hash the sizes of the files, the range of sequences, and the tokens at both ends."""
        tokens = self.data.tokens
        bounds = self.sequences.start, self.sequences.stop
        sizes = f"{len(self.data)} {len(tokens)} {self.size} {bounds} {self.seq_len}"
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
        return _map_rows(itemgetter(back), _concatenate(parts))

    def digest(self) -> str:
        weights = " ".join(map(repr, self.blend.weights))
        return digest([f"mixed {weights}", *(source.digest() for source in self.sources)])


def _concatenate(parts: list[Rows]) -> Rows:
    columns: dict[str, Any] = {
        field.name: [getattr(part, field.name) for part in parts] for field in fields(Rows)
    }
    # A None beside a mask means that all targets count, or that no target crosses.
    for name, value in (("counted", True), ("crosses", False)):
        if any(x is not None for x in columns[name]):
            columns[name] = [
                np.full_like(part.tokens[:, 1:], value, bool) if x is None else x
                for part, x in zip(parts, columns[name], strict=True)
            ]
    for name, xs in columns.items():
        columns[name] = None if xs[0] is None else np.concatenate(xs)
    return Rows(**columns)
