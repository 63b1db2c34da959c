"""Best-fit packing: rows of whole documents, with as few splits and as little padding as possible.

Splitting one long sequence of tokens into rows also splits documents, and the rest of a
split document loses its beginning. For fine-tuning on short documents it is better to treat rows as
bins. The method is best-fit decreasing (Ding et al. 2024, arXiv:2404.10830, section 3). Take
documents from the longest to the shortest. Put each document into the fullest row that still has
room for it. Open a new row if no row has room. On text this fills rows within a fraction of a
percent. A document longer than a row is first split into segments of one row each.

Documents that belong together, such as the two answers of a pair, are one item of a row, and follow
each other in it.

A row knows where its documents begin and end. So documents never attend to each other, and
positions restart in each document. The rows are packed once, and every epoch has its own order of
the rows. Left out: packing again in each epoch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, replace

import numpy as np

from dtron.data.cache import digest
from dtron.data.chunks import epoch_order
from dtron.data.mapped import check_uncut
from dtron.data.sources import Rows, check_vocab


def split_into_segments(
    starts: np.ndarray, lengths: np.ndarray, seq_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split documents into segments of at most ``seq_len`` + 1 tokens and return the segments'
    starts and lengths.

    Neighbouring segments share a token, so every token but a document's first is a target once. A
    segment of one token has no target and is left out."""
    pieces = np.maximum(-(-(lengths.astype(np.int64) - 1) // seq_len), 0)
    owner = np.repeat(np.arange(len(lengths)), pieces)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return starts[owner] + nth * seq_len, np.minimum(seq_len + 1, lengths[owner] - nth * seq_len)


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Return bins of at most ``capacity``, each a list of its items, by best-fit decreasing."""
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # bins by the room that is left in them
    rooms: list[int] = []  # the keys of with_room that have bins, sorted
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            bins.append([])
            chosen, room = len(bins) - 1, capacity
        else:
            room = rooms[at]
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms.pop(at)
        bins[chosen].append(item)
        if left := room - length:
            if not with_room.setdefault(left, []):
                insort(rooms, left)
            with_room[left].append(chosen)
    return bins


@dataclass(frozen=True, eq=False)
class TokenizedDocuments:
    """Documents in one array of tokens.

    Document i is ``tokens[starts[i] : starts[i] + lengths[i]]``.

    ``learn``: for each token, whether it is learned as a target (None: all tokens are).
    ``group``: so many documents in a row belong together, such as the two answers of a pair. A
        group fits into a row."""

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    learn: np.ndarray | None = None
    group: int = 1

    def part(self, documents: slice) -> TokenizedDocuments:
        """Return some of the documents."""
        return replace(self, starts=self.starts[documents], lengths=self.lengths[documents])


class Fitted:
    """Samples from whole documents, packed by best fit. Padding and the first token of a document
    are never learned.

    ``vocab``: every id must be below it (None: any id is valid)."""

    def __init__(
        self,
        documents: TokenizedDocuments,
        seq_len: int,
        seed: int,
        shuffle: bool = True,
        vocab: int | None = None,
    ):
        self.tokens, self.learn = documents.tokens, documents.learn
        self.seq_len, self.seed, self.shuffle, self.vocab = seq_len, seed, shuffle, vocab
        self.starts, self.lengths = split_into_segments(
            documents.starts, documents.lengths, seq_len
        )
        groups = np.arange(len(self.lengths)).reshape(-1, documents.group)
        bins = best_fit(self.lengths[groups].sum(1), seq_len + 1)
        self.bins = [groups[items].flatten().tolist() for items in bins]
        self.size = int(documents.lengths.sum(dtype=np.int64))

    def __len__(self) -> int:
        return len(self.bins)

    def rows(self, start: int, count: int) -> Rows:
        check_uncut(self.tokens)
        shape = (count, self.seq_len + 1)
        tokens, documents = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        positions, counted = np.zeros(shape, np.int64), np.zeros(shape, bool)
        for row in range(count):
            items = self._bin(start + row)
            filled = 0
            for number, item in enumerate(items):
                first, n = int(self.starts[item]), int(self.lengths[item])
                stop = filled + n
                tokens[row, filled:stop] = self.tokens[first : first + n]
                documents[row, filled:stop] = number
                positions[row, filled:stop] = np.arange(n)
                learn = True if self.learn is None else self.learn[first + 1 : first + n]
                counted[row, filled + 1 : stop] = learn
                filled = stop
            documents[row, filled:] = len(items)  # padding is a document of its own
            positions[row, filled:] = np.arange(shape[1] - filled)
        check_vocab(tokens, self.vocab, "the text")
        return Rows(tokens, documents[:, :-1], positions[:, :-1], counted[:, 1:])

    def _bin(self, sample: int) -> list[int]:
        """Return the segments in this sample of the run."""
        epoch, place = divmod(sample, len(self))
        return self.bins[epoch_order(len(self), self.seed, epoch)[place] if self.shuffle else place]

    def digest(self) -> str:
        """Hash the size and the tokens at both ends."""
        ends = [
            np.ascontiguousarray(part).tobytes()
            for part in (self.tokens[:65536], self.tokens[-65536:])
        ]
        return digest([f"fitted {self.size} {len(self.starts)} {len(self)} {self.seq_len}", *ends])
