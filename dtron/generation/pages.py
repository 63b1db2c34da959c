"""The free pages of the KV cache, on the host."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class FreePages:
    """The free pages of each pool. A rank of data parallelism has one pool. A value: ``take`` and
    ``give`` return the new one.

    ``pools``: the page numbers that are free in each pool. 0, the null page, is never free."""

    pools: tuple[tuple[int, ...], ...]

    @classmethod
    def all(cls, pools: int, pages: int) -> FreePages:
        """Return ``pools`` pools in which all of ``pages`` pages are free but the null page."""
        return cls((tuple(range(pages - 1, 0, -1)),) * pools)

    def count(self, pool: int) -> int:
        return len(self.pools[pool])

    def take(self, pool: int, count: int) -> tuple[FreePages, tuple[int, ...]]:
        """Take pages. There must be ``count`` of them."""
        free = self.pools[pool]
        assert count <= len(free), f"{count} pages of {len(free)}"
        left = len(free) - count
        return self._with(pool, free[:left]), free[left:][::-1]

    def give(self, pool: int, pages: tuple[int, ...]) -> FreePages:
        """Give pages back. The last ones given are the first ones taken."""
        return self._with(pool, self.pools[pool] + pages[::-1])

    def _with(self, pool: int, free: tuple[int, ...]) -> FreePages:
        return replace(self, pools=(*self.pools[:pool], free, *self.pools[pool + 1 :]))
