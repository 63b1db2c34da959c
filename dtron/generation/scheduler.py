"""The scheduler of continuous batching (Yu et al. 2022, Orca, OSDI): which tokens the next step
runs.

Requests join and leave between steps. A request waits until a row is free and there are pages for
its text. Then its text is run in chunks (*prefill*), and after that one token per step (*decode*).
A step has a chunk of some rows beside the decoding of the others, so a long prompt does not stop
the other texts (Agrawal et al. 2023, arXiv:2308.16369).

Requests are served in the order of their arrival. A row takes a page when it needs one. If no page
is free, the youngest request of the pool is preempted: its pages are freed, and it waits again and
computes its text once more. The oldest request of a pool is never preempted, so it always ends.

The scheduler runs on the host and knows no tensor. All ranks run it with the same requests, so all
ranks take the same decisions.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from dtron.errors import UserError
from dtron.generation.pages import FreePages
from dtron.generation.sampling import Sampling

KERNEL_PAGE = 128
"""the tokens of a page, where a kernel reads pages in their places: its blocks divide them"""


@dataclass(frozen=True)
class CacheSize:
    """The size of the cache, and of a step.

    ``rows``: the number of texts that run at once, over all ranks.
    ``pages``: the number of pages of each pool, with the null page.
    ``page``: the number of tokens of a page. A kernel that reads pages in their places needs
        ``KERNEL_PAGE``.
    ``chunk``: the number of tokens of a text that prefill runs at once, at most.
    ``prefill_rows``: the number of texts of each pool that a step prefills at most."""

    rows: int
    pages: int
    page: int = 16
    chunk: int = 256
    prefill_rows: int = 4

    def __post_init__(self) -> None:
        for name in ("rows", "page", "chunk", "prefill_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} of a cache: at least 1; raise it")
        if self.pages < 2:
            raise UserError(
                f"pages={self.pages} of a cache: one is for padding; use 2 pages or more"
            )

    def pages_for(self, tokens: int) -> int:
        """Return the number of pages for so many tokens."""
        return -(-tokens // self.page)


@dataclass(order=True)
class Request:
    """A request, and how far it is. Requests are ordered by their arrival.

    ``number``: the number of the request.
    ``text``: the tokens of the prompt and of its continuation.
    ``prompt``: the number of tokens of the prompt.
    ``tokens``: the largest number of new tokens.
    ``ends``: tokens that end the text.
    ``row``: the row of the batch (None: it waits).
    ``cached``: the number of tokens that are in the cache.
    ``pages``: the block table."""

    number: int
    text: list[int] = field(compare=False)
    prompt: int = field(compare=False)
    tokens: int = field(compare=False)
    sampling: Sampling = field(compare=False)
    ends: frozenset[int] = field(compare=False)
    generator: torch.Generator = field(compare=False)
    row: int | None = field(default=None, compare=False)
    cached: int = field(default=0, compare=False)
    pages: tuple[int, ...] = field(default=(), compare=False)

    @property
    def decoding(self) -> bool:
        """Whether only the last token is not in the cache. The first token of a text is never
        decoded: prefill empties the row's recurrent states."""
        return 0 < self.cached == len(self.text) - 1

    @property
    def finished(self) -> Literal["stop", "length"] | None:
        """Why the text has ended, in the words of OpenAI's API; None: it goes on."""
        if len(self.text) > self.prompt and self.text[-1] in self.ends:
            return "stop"
        return "length" if len(self.text) >= self.prompt + self.tokens else None


@dataclass(frozen=True)
class Piece:
    """Tokens of a request that a step runs: ``text[cached : cached + count]``."""

    request: Request
    count: int

    @property
    def complete(self) -> bool:
        """Whether the text ends with this piece, so that its next token can be drawn."""
        return self.request.cached + self.count == len(self.request.text)


class Scheduler:
    """The requests that wait, and those in the rows of the batch.

    ``pools``: the number of pools of pages. The rows are divided among the pools in order."""

    def __init__(self, size: CacheSize, pools: int):
        self.size, self._own = size, size.rows // pools
        self.free = FreePages.all(pools, size.pages)
        self.waiting: list[Request] = []
        self.rows: list[Request | None] = [None] * size.rows

    @property
    def running(self) -> list[Request]:
        """The requests in rows, the oldest first."""
        return sorted(request for request in self.rows if request is not None)

    def add(self, request: Request) -> None:
        """Add a request. Raises UserError if its text can never be in the cache."""
        tokens = len(request.text) + request.tokens - 1  # the last one is not run
        if self.size.pages_for(tokens) > self.size.pages - 1:
            raise UserError(
                f"a text of {tokens + 1} tokens: the cache has {self.size.pages - 1} pages of "
                f"{self.size.page} tokens; ask for fewer tokens, or use a larger cache"
            )
        insort(self.waiting, request)

    def remove(self, request: Request) -> None:
        """Remove a request, which waits or runs."""
        if request.row is None:
            self.waiting.remove(request)
        else:
            self._leave(request)

    def plan(self) -> tuple[list[Piece], list[Piece]]:
        """Admit requests, and return the pieces of the next step: of prefill, and of decode. Their
        pages are taken."""
        self._admit()
        prefill, decode = [], []
        for request in self._scheduled():
            if request.decoding:
                if self._grow(request):
                    decode.append(Piece(request, 1))
            elif request.row is not None:  # it may have been preempted for an older one
                count = min(self.size.chunk, len(request.text) - request.cached)
                prefill.append(Piece(request, count))
        return prefill, decode

    def commit(self, piece: Piece) -> None:
        """Note that the tokens of a piece are in the cache."""
        piece.request.cached += piece.count

    def _scheduled(self) -> Iterator[Request]:
        """Yield the requests that run in the next step, the oldest first."""
        prefilled = [0] * len(self.free.pools)
        for request in self.running:
            if request.row is not None and not request.decoding:
                pool = self._pool(request.row)
                prefilled[pool] += 1
                if prefilled[pool] > self.size.prefill_rows:
                    continue
            yield request

    def _admit(self) -> None:
        """Move requests to free rows. A request takes the pages of all its text, in the pool with
        the most free pages. A page for each text there that still grows stays free. Otherwise a
        request that has just been preempted would come back, only to be preempted again."""
        while self.waiting:
            request = self.waiting[0]
            rows = [i for i, other in enumerate(self.rows) if other is None]
            row = max(rows, key=lambda i: self.free.count(self._pool(i)), default=None)
            if row is None:
                return
            pool, count = self._pool(row), self.size.pages_for(len(request.text))
            spare = sum(self._grows(r) for r in self._of_pool(pool))
            if count + spare > self.free.count(pool):
                return
            self.free, request.pages = self.free.take(pool, count)
            request.row, self.rows[row] = row, self.waiting.pop(0)

    def _grow(self, request: Request) -> bool:
        """Take a page for the next token if it needs one. Return whether the request still runs."""
        while request.row is not None and len(request.text) > len(request.pages) * self.size.page:
            pool = self._pool(request.row)
            if self.free.count(pool):
                self.free, more = self.free.take(pool, 1)
                request.pages += more
            else:
                self._preempt(pool)
        return request.row is not None

    def _preempt(self, pool: int) -> None:
        """Let the youngest request of a pool wait again."""
        youngest = max(self._of_pool(pool))
        self._leave(youngest)
        insort(self.waiting, youngest)

    def _leave(self, request: Request) -> None:
        assert request.row is not None
        self.free = self.free.give(self._pool(request.row), request.pages)
        self.rows[request.row] = None
        request.row, request.cached, request.pages = None, 0, ()

    def _grows(self, request: Request) -> bool:
        """Whether a request may need more pages than it has."""
        return self.size.pages_for(request.prompt + request.tokens - 1) > len(request.pages)

    def _of_pool(self, pool: int) -> list[Request]:
        """Return the requests in the rows of a pool."""
        return [r for r in self.rows[pool * self._own : (pool + 1) * self._own] if r is not None]

    def _pool(self, row: int) -> int:
        return row // self._own

    def places(self, pieces: Sequence[Piece]) -> list[list[tuple[int, Piece]]]:
        """Return the pieces of each pool, each with its row's place in the pool."""
        found: list[list[tuple[int, Piece]]] = [[] for _ in self.free.pools]
        for piece in pieces:
            assert piece.request.row is not None
            pool, place = divmod(piece.request.row, self._own)
            found[pool].append((place, piece))
        return found
