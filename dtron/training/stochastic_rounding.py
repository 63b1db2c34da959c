"""Random numbers for stochastic rounding, the same on every mesh.

Near 1 two neighbours of bfloat16 are 1/128 apart. A second moment with decay 0.999 moves by at most
1/1000 of itself when gradients become small. Rounded to the nearest number it would never move. So
a moment is rounded up with a probability that is its distance from the lower neighbour. Then it is
right on average (Gupta et al. 2015, arXiv:1502.02551).

The random number of an element is a hash of the number of the update, the path of the weight, and
the index of the element in the whole weight. So a mesh does not change the result, and a run that
is resumed rounds as the run that was not interrupted. No state of a generator is kept.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from dtron.mesh import Layout
from dtron.params import WeightSpec
from dtron.training.state_formats import in_blocks


def random_bits(places: Sequence[Tensor], step: Tensor, draw: int) -> Tensor:
    """Return 16 random bits for each element of a shard, as int32.

    ``places``: see ``places``. A vector may be in blocks, as a matrix.
    ``step``: the number of the update.
    ``draw``: the number of the state among those of the weight."""
    x, later = step.to(torch.int32) * 0x9E3779B + draw * 0x3C6EF372, 0
    for place in reversed(places):
        x = x + place.view([*place.shape] + [1] * later)
        later += place.ndim
    # A hash of 32 bits that mixes all of them. Its shifts are logical, and those of int32 are not.
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * -0x7B935975
    return x >> 16 & 0xFFFF


def places(w: WeightSpec, layout: Layout, device: torch.device, known: dict) -> tuple[Tensor, ...]:
    """Return a vector for each dim of this rank's shard. The sum of an element's entries is its
    index in the whole weight, plus a number of the weight, modulo 2^32.

    ``known``: vectors of other weights of this update, to which those of this one are added."""
    found, stride = [], 1
    for axis, size in reversed(list(zip(w.axes, w.shape, strict=True))):
        if (key := (axis, size)) not in known:
            known[key] = layout.to_local(layout.iota(axis, size, device), axis).to(torch.int32)
        found.append(known[key] * stride if stride > 1 else known[key])
        stride = stride * size % 2**31
    found[-1] = found[-1] + zlib.crc32(w.path.encode()) % 2**31
    return tuple(reversed(found))


def places_in_blocks(places: Sequence[Tensor], dim: int) -> tuple[Tensor, ...]:
    """Return the indices of a shard's elements for a view in blocks."""
    return tuple(in_blocks(x, 0) if i == dim else x for i, x in enumerate(places))
