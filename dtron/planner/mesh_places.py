"""The place of a rank in its mesh: its index on each axis, and the ranks of its groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

from dtron.distributed.mesh_shape import AXES, MeshShape, is_part


def coordinates(shape: MeshShape, rank: int) -> dict[str, int]:
    """Return a rank's index on each axis of several ranks. The last axis has adjacent ranks."""
    found, rest = dict[str, int](), rank
    for axis in reversed(AXES):
        rest, found[axis] = divmod(rest, shape.sizes[axis])
    return {axis: found[axis] for axis in AXES if shape.sizes[axis] > 1}


def axes_in_use(shape: MeshShape) -> list[str]:
    """Return the axes of more than one rank, those of experts last."""
    experts = [axis for axis in ("ep", "etp") if getattr(shape, axis) > 1]
    return [axis for axis in AXES if shape.sizes[axis] > 1] + experts


def group_of(shape: MeshShape, axis: str, rank: int) -> list[int]:
    """Return the ranks of a rank's group on an axis, in order."""
    own, strides, rest = 0, list[range](), math.prod(shape.atoms.values())
    for atom, n in shape.atoms.items():
        rest //= n
        if atom == axis or is_part(atom, axis):
            strides.append(range(0, n * rest, rest))
            own += rank // rest % n * rest
    return sorted(rank - own + sum(steps) for steps in product(*strides))


def ranks_text(ranks: Sequence[int], most: int = 4) -> str:
    """Return ``0 to 7`` for adjacent ranks, and ``0, 8, 16, ... 248`` for others."""
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]} to {ranks[-1]}"
    if len(ranks) <= most:
        return ", ".join(map(str, ranks))
    return f"{', '.join(map(str, ranks[: most - 1]))}, ... {ranks[-1]}"
