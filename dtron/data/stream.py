"""Text that is tokenised during the run, without preparation and without disk space.

The documents are taken in the order of their files, without a shuffle: shuffle them beforehand. The
first ``HELD`` samples are held out for validation.

Reading goes forward only, but the source is still a pure function of the sample's number. If the
requested sample is not the next one, the source goes back to the last remembered document before
this sample, or to the first document of all, and tokenises from there. So a resumed run pays for
the text that it skips. Use ``prepare`` on the files for a run where this cost matters. Every rank
tokenises the whole global batch.

Left out: shuffling in a buffer, and sharing the work between ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
from tokenizers import Tokenizer

from dtron.data.cache import digest
from dtron.data.chunks import document_ids
from dtron.data.documents import Documents
from dtron.data.sources import Rows
from dtron.data.special_tokens import end_id
from dtron.data.tokenization import encoded, encoder_of
from dtron.errors import UserError

HELD = 32
_MARK = 1 << 20  # tokens between remembered documents


class Stream:
    """Samples of streamed documents, from sample ``first`` of the stream on.

    ``count``: number of samples in an epoch (0: no limit).
    ``end``: the token that ends a document (None: the token that `end_id` finds).
    ``size`` is 0, because the size is not known."""

    size = 0

    def __init__(
        self,
        docs: Documents,
        tokenizer: Tokenizer,
        seq_len: int,
        marks: bool,
        first: int = 0,
        count: int = 0,
        end: int | None = None,
    ) -> None:
        self.docs, self.encoder, self.seq_len = docs, encoder_of(tokenizer), seq_len
        self.marks, self.first, self.count = marks, first, count
        self.end = end_id(tokenizer) if end is None else end
        # Remembered places: (place in the stream of tokens, number of documents before it). Both
        # count from the first epoch.
        self._known = [(0, 0)]
        self._in_epoch = 0  # documents of an epoch; 0: not known yet
        self._next, self._left, self._pieces = 0, np.empty(0, np.int64), self._from(0)

    def __len__(self) -> int:
        return self.count

    def rows(self, start: int, count: int) -> Rows:
        """Return the samples. Raises UserError when it reaches text that cannot be read."""
        if self.count:
            numbers = [self.first + i % self.count for i in range(start, start + count)]
            out = np.concatenate([self._take(0, 0), *(self._take(number, 1) for number in numbers)])
        else:
            out = self._take(self.first + start, count)
        return Rows.marked(out, *document_ids(out, self.end)) if self.marks else Rows(out)

    def digest(self) -> str:
        sizes = f"{self.seq_len} {self.first} {self.count}"
        if self.end != end_id(self.encoder):
            sizes += f" {self.end}"
        return digest([f"stream {self.docs.key} {sizes}", self.encoder.to_str()])

    def _take(self, number: int, count: int) -> np.ndarray:
        s = self.seq_len
        if not count:
            return np.empty((0, s + 1), np.int64)
        if number != self._next:
            place, document = max(known for known in self._known if known[0] <= number * s)
            self._pieces, self._left = self._from(document, place), np.empty(0, np.int64)
            self._drop(number * s - place)
        self._fill(count * s + 1)
        self._next = number + count
        tokens = self._left[: count * s + 1]
        out = np.lib.stride_tricks.sliding_window_view(tokens, s + 1)[::s].copy()
        self._left = self._left[count * s :]
        return out

    def _drop(self, tokens: int) -> None:
        while tokens:
            self._fill(1)
            some = min(tokens, len(self._left))
            self._left, tokens = self._left[some:], tokens - some

    def _fill(self, tokens: int) -> None:
        parts, have = [self._left], len(self._left)
        while have < tokens:
            parts.append(next(self._pieces))
            have += len(parts[-1])
        self._left = np.concatenate(parts)

    def _from(self, document: int, place: int = 0) -> Iterator[np.ndarray]:
        """Yield the tokens of documents from this document on, epoch after epoch, without end."""
        while True:
            skipped = document % self._in_epoch if self._in_epoch else document
            number = document - skipped
            docs, before = islice(iter(self.docs), skipped, None), place
            for ids, last in encoded(docs, self.encoder, self.end, np.dtype(np.int64)):
                yield ids
                place, document = place + len(ids), document + last
                if last and place >= self._known[-1][0] + _MARK:
                    self._known.append((place, document))
            self._in_epoch = document - number
            if place == before and not skipped:
                raise UserError(
                    f"--data.path {self.docs.path!r}: the tokenizer makes no token of its text; "
                    "give another --data.tokenizer"
                )
