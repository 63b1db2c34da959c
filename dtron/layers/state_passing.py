"""How a recurrent state passes through the chunks of a sequence, and from rank to rank.

A layer with a recurrent state S changes it, over any run of tokens, by an affine map:

    S  ->  A S + B

``A`` is what the tokens leave of the state before them, and ``B`` is what they add. In the delta
rule A is a matrix ``[K, K]``; in a state space model it is a number, ``[1, 1]``. Two maps in
succession are one map of the same size:

    A_2 (A_1 S + B_1) + B_2  =  (A_2 A_1) S + (A_2 B_1 + B_2)

So a run of tokens may be cut anywhere. Each piece computes its map without the state before it, in
parallel with all other pieces, and only the small maps are combined in order. ``states_before``
cuts three times: into chunks, into groups of chunks, and into the shards of the cp ranks. Chunks
are combined group by group, all groups at once, and then the groups are combined. With C chunks
this takes about 2 sqrt(C) dependent steps instead of C.

**Over cp** each rank has the map of its own shard. One all-gather gives every rank all maps, and
each rank combines the maps of the ranks before it. Autograd's backward is one reduce-scatter of the
same size. The bytes do not depend on the length of the sequence: see ``map_elements``. The first
token of each row starts a document, which sets A to zero. So the first rank needs no special case.

Left out: a ring that hands on the state alone. It sends K * V numbers instead of n * K * (K + V),
but each rank waits for all ranks before it. A binary tree would save bytes for many ranks; maps are
small beside the tokens of a shard that is worth a rank.
"""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from dtron.bounds import nearest_divisor
from dtron.distributed.collectives import AxisGroup, all_gather


class Maps(NamedTuple):
    """Affine maps of a state.

    ``transition``: ``[..., K, K]``, or ``[..., 1, 1]`` for a number.
    ``offset``: ``[..., K, V]``."""

    transition: Tensor
    offset: Tensor


class SequenceRanks(NamedTuple):
    """The cp ranks that share each sequence.

    ``group``: the ranks, in the order of their shards.
    ``place [1]``: the index of this rank's shard."""

    group: AxisGroup
    place: Tensor


def states_before(
    maps: Maps, state: Tensor | None = None, ranks: SequenceRanks | None = None
) -> tuple[Tensor, Tensor]:
    """Return the state before each of C maps, ``[C, ..., K, V]``, and the state after the last one.

    ``maps``: the maps of C successive chunks, along the first dim.
    ``state``: the state before the first chunk (None: zero). Not together with ``ranks``.
    ``ranks``: the ranks whose shards come before and after these chunks (None: no other shards)."""
    count = len(maps.offset)
    size = nearest_divisor(count, round(sqrt(count)))
    groups = Maps(*(x.unflatten(0, (-1, size)).transpose(0, 1) for x in maps))
    in_group, of_groups = combined(groups)
    of_chunks, whole = combined(of_groups)
    if ranks is not None:
        state = state_of_earlier_ranks(whole, ranks)
    elif state is None:
        state = torch.zeros_like(whole.offset)
    states = applied(in_group, applied(of_chunks, state))  # [size, C / size, ...]
    return states.transpose(0, 1).flatten(0, 1), applied(whole, state)


def applied(maps: Maps, state: Tensor) -> Tensor:
    """Apply maps to a state: ``A S + B``."""
    return product(maps.transition, state) + maps.offset


def product(transition: Tensor, x: Tensor) -> Tensor:
    """Multiply by a transition, which is a matrix or a number."""
    return transition * x if transition.shape[-1] == 1 else transition @ x


def combined(maps: Maps) -> tuple[Maps, Maps]:
    """Combine successive maps along the first dim. Return, for each map, the combination of the
    maps before it, and the combination of all maps."""
    like = maps.transition
    eye = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    before = Maps(eye.expand_as(like[0]), torch.zeros_like(maps.offset[0]))
    found = [before]
    for transition, offset in zip(*maps, strict=True):
        last = found[-1]
        moved = applied(Maps(transition, offset), last.offset)
        found.append(Maps(product(transition, last.transition), moved))
    return Maps(*(torch.stack(xs) for xs in zip(*found[:-1], strict=True))), found[-1]


def state_of_earlier_ranks(own: Maps, ranks: SequenceRanks) -> Tensor:
    """Return the state at the start of a rank's shard: the maps of all earlier ranks, applied to
    zero. Inside a local region; differentiable.

    ``own``: the map of this rank's shard."""
    packed = torch.cat([x.flatten() for x in own])[None]
    sizes = [x.numel() for x in own]
    gathered = all_gather(packed, ranks.group.ranks).split(sizes, dim=1)  # all-gather over cp
    maps = Maps(*(x.unflatten(1, one.shape) for x, one in zip(gathered, own, strict=True)))
    return combined(maps)[0].offset.index_select(0, ranks.place)[0]


def map_elements(rows: int, heads: int, key_dim: int, value_dim: int, scalar: bool = False) -> int:
    """Return the number of elements in a rank's message: for each row and head its map.

    ``scalar``: the transition is a number, not a matrix."""
    transition = 1 if scalar else key_dim * key_dim
    return rows * heads * (transition + key_dim * value_dim)
