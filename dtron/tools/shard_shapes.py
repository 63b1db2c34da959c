"""The shards of a tensor on every rank, from sizes and placements alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

Placements = tuple


def local_shape(
    whole: Sequence[int],
    mesh_sizes: Sequence[int],
    placements: Placements,
    coordinate: Sequence[int],
) -> tuple[int, ...]:
    """Return the shape of the shard on the rank at ``coordinate``."""
    ranges = local_range(whole, mesh_sizes, placements, coordinate)
    return tuple(stop - start for start, stop in ranges)


def local_range(
    whole: Sequence[int],
    mesh_sizes: Sequence[int],
    placements: Placements,
    coordinate: Sequence[int],
) -> list[tuple[int, int]]:
    """Return ``(start, stop)`` of every dim on the rank at ``coordinate``. A dim is sharded as in
    DTensor: into shards of ``ceil(size / n)``; the last ranks may have less or nothing."""
    ranges = [(0, size) for size in whole]
    for n, placement, i in zip(mesh_sizes, placements, coordinate, strict=True):
        if placement.is_shard():
            start, stop = ranges[placement.dim]
            step = -(-(stop - start) // n)
            ranges[placement.dim] = (min(start + i * step, stop), min(start + (i + 1) * step, stop))
    return ranges


def coordinates(sizes: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
    """Return ``(rank, coordinate)`` of every rank, in row-major order."""
    return list(enumerate(product(*map(range, sizes))))
