"""Rates between measured ones.

A table of a file of rates is a number, rows, or a grid. Between the measured sizes a rate is
interpolated, linearly in the logarithms of the sizes. Beyond them it is that of the last size."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Sequence[float]]


def along(rows: Rows, size: float) -> Sequence[float]:
    """Return the values of ``rows`` at a size. A row is a size and its values, sorted by size."""
    sizes = [row[0] for row in rows]
    (i, j), share = _between(sizes, size)
    pairs = zip(rows[i][1:], rows[j][1:], strict=True)
    return [a + (b - a) * share for a, b in pairs]


def nearest(rows: Rows, point: Sequence[float]) -> float:
    """Return the last value of the row whose first values are nearest to a point."""

    def distance(row: Sequence[float]) -> float:
        pairs = zip(row, point, strict=False)
        return sum(math.log(max(a, 1) / max(b, 1)) ** 2 for a, b in pairs)

    return min(rows, key=distance)[-1]


def on_grid(grid: Mapping[str, Any], layout: str, point: Sequence[float]) -> float:
    """Return the rate at ``(M, N, K)``.

    ``grid``: "sizes", and for each layout the rates by M, N and K. A layout that was not measured
        has the rates of the first one."""
    sizes: Sequence[float] = grid["sizes"]
    rates = grid.get(layout) or next(x for name, x in grid.items() if name != "sizes")
    corners = [_between(sizes, x) for x in point]
    total = 0.0
    for places in itertools.product((0, 1), repeat=3):
        share, cell = 1.0, rates
        for ends, place in zip(corners, places, strict=True):
            share *= ends[1] if place else 1 - ends[1]
            cell = cell[ends[0][place]]
        total += share * cell
    # A tile of a kernel is computed whole, however few of its rows or columns are there.
    small = math.prod(min(1.0, x / sizes[0]) for x in point[:2])
    return total * small


def rate(table: Any, layout: str, point: Sequence[float]) -> float:
    """Return the rate of a table of any kind at ``(M, N, K)``."""
    if isinstance(table, Mapping):
        return on_grid(table, layout, point)
    return nearest(table, point) if isinstance(table, Sequence) else float(table)


def _between(sizes: Sequence[float], x: float) -> tuple[tuple[int, int], float]:
    """Return the places of the two sizes around x, and how far x is from the first to the
    second."""
    j = min(bisect_right(sizes, x), len(sizes) - 1)
    i = max(j - 1, 0)
    if i == j or x <= sizes[i]:
        return (i, i), 0.0
    share = math.log(x / sizes[i]) / math.log(sizes[j] / sizes[i])
    return (i, j), min(1.0, share)
