"""How a recurrent state passes through the chunks of a sequence, and from rank to rank.

A layer with a recurrent state S changes it, over any run of tokens, by an affine map:

    S  ->  A S + B

``A`` is what the tokens leave of the state before them, and ``B`` is what they add. In a state
space model A is a number, the decay. In the delta rule A is a matrix ``[K, K]``: the decay, and the
change by what the tokens have read. Two maps in succession are one map of the same size:

    A_2 (A_1 S + B_1) + B_2  =  (A_2 A_1) S + (A_2 B_1 + B_2)

So a run of tokens may be cut anywhere. Each piece computes its map without the state before it, in
parallel with all other pieces, and only the small maps are combined in order. ``states_before``
cuts into the shards of the cp ranks, into chunks, and into groups of chunks. The chunks of a group
are combined in order, all groups at once. Then the groups are combined in the same way, in groups
of groups, until one map is left. With C chunks this takes about ``GROUP`` log(C) / log(``GROUP``)
dependent steps instead of C, and each map is used once on the way up and once on the way down.

Decay and change are kept apart for their rounding. A state that only decays is never rounded,
however many chunks it passes. The product with the change has factors in few bits: it is a
correction of the state.

**Over cp** each rank has the map of its own shard. One all-gather gives every rank all maps, and
each rank combines the maps of the ranks before it. Autograd's backward is one reduce-scatter of the
same size. The bytes do not depend on the length of the sequence: see ``map_elements``. The first
token of each row starts a document, which sets A to zero. So the first rank needs no special case.

Left out: a ring that hands on the state alone. It sends K * V numbers instead of n * K * (K + V),
but each rank waits for all ranks before it. A binary tree would save bytes for many ranks; maps are
small beside the tokens of a shard that is worth a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dtron.bounds import nearest_divisor
from dtron.distributed.collectives import AxisGroup, all_gather
from dtron.layers.wide_product import wide_product

GROUP = 8  # maps that are combined in order


class Maps(NamedTuple):
    """Affine maps of a state, ``S -> decay S + change S + offset``.

    ``decay``: ``[..., K, 1]``, or ``[..., 1, 1]`` for a number.
    ``change``: ``[..., K, K]``; None: the transition is ``decay`` alone.
    ``offset``: ``[..., K, V]``."""

    decay: Tensor
    change: Tensor | None
    offset: Tensor

    def each(self, fn: Callable[[Tensor], Tensor]) -> Maps:
        """Return the maps with ``fn`` applied to each tensor."""
        change = None if self.change is None else fn(self.change)
        return Maps(fn(self.decay), change, fn(self.offset))

    def unbind(self) -> list[Maps]:
        """Return the maps along the first dim."""
        decays, offsets = self.decay.unbind(0), self.offset.unbind(0)
        changes = [None] * len(offsets) if self.change is None else self.change.unbind(0)
        return [Maps(*parts) for parts in zip(decays, changes, offsets, strict=True)]

    @property
    def transition(self) -> Tensor:
        """The matrix A, ``[..., K, K]``; or a number, ``[..., 1, 1]``."""
        if self.change is None:
            return self.decay
        eye = torch.eye(self.change.shape[-1], dtype=self.decay.dtype, device=self.decay.device)
        return self.decay * eye + self.change


class SequenceRanks(NamedTuple):
    """The cp ranks that share each sequence.

    ``group``: the ranks, in the order of their shards.
    ``place [1]``: the index of this rank's shard."""

    group: AxisGroup
    place: Tensor


def states_before(
    maps: Maps,
    state: Tensor | None = None,
    ranks: SequenceRanks | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the state before each of C maps, ``[C, ..., K, V]``, and the state after the last one.

    ``maps``: the maps of C successive chunks, along the first dim.
    ``state``: the state before the first chunk (None: zero). Not together with ``ranks``.
    ``ranks``: the ranks whose shards come before and after these chunks (None: no other shards).
    ``dtype``: the factors of matmuls are rounded to it, see wide_product.py (None: to none)."""
    dtype, levels = dtype or maps.offset.dtype, []
    while (count := len(maps.offset)) > 1:
        size = nearest_divisor(count, GROUP)
        groups = maps.each(partial(_grouped, size=size if size > 1 else count))
        before, maps = combined(groups, dtype)  # [size - 1, count / size, ...], [count / size, ...]
        levels.append(before)
    whole = maps.each(lambda x: x[0])
    if ranks is not None:
        state = state_of_earlier_ranks(whole, ranks)
    elif state is None:
        state = torch.zeros_like(whole.offset)
    states = state[None]
    for before in reversed(levels):
        later = applied(before, states, dtype)
        states = torch.cat([states[None], later]).transpose(0, 1).flatten(0, 1)
    return states, applied(whole, state, dtype)


def _grouped(x: Tensor, size: int) -> Tensor:
    """Split the first dim into groups of one size: ``[C, ...]`` -> ``[size, C / size, ...]``."""
    return x.unflatten(0, (-1, size)).transpose(0, 1)


def applied(maps: Maps, state: Tensor, dtype: torch.dtype) -> Tensor:
    """Apply maps to a state.

    ``dtype``: see ``states_before``."""
    kept = maps.decay * state + maps.offset
    if maps.change is None:
        return kept
    return kept + wide_product(maps.change, state.expand_as(maps.offset), dtype)


def after(second: Maps, first: Maps, dtype: torch.dtype) -> Maps:
    """Return the map that applies ``first`` and then ``second``.

    ``dtype``: see ``states_before``."""
    decay = second.decay * first.decay
    if second.change is None or first.change is None:
        return Maps(decay, None, applied(second, first.offset, dtype))
    widths = first.change.shape[-1], first.offset.shape[-1]
    columns = torch.cat([first.change, first.offset], dim=-1)
    changed, moved = wide_product(second.change, columns, dtype).split(widths, dim=-1)
    change = second.decay * first.change + second.change * first.decay.mT + changed
    return Maps(decay, change, second.decay * first.offset + moved + second.offset)


def combined(maps: Maps, dtype: torch.dtype) -> tuple[Maps, Maps]:
    """Combine two or more successive maps along the first dim. Return, for each map but the first,
    the combination of the maps before it; and the combination of all maps.

    ``dtype``: see ``states_before``."""
    first, *others = maps.unbind()
    found = [first]
    for one in others:
        found.append(after(one, found[-1], dtype))
    *before, whole = found
    decays, changes, offsets = zip(*before, strict=True)
    stacked = None if first.change is None else torch.stack(changes)
    return Maps(torch.stack(decays), stacked, torch.stack(offsets)), whole


def state_of_earlier_ranks(own: Maps, ranks: SequenceRanks) -> Tensor:
    """Return the state at the start of a rank's shard: the maps of all earlier ranks, applied to
    zero. Inside a local region; differentiable.

    ``own``: the map of this rank's shard."""
    tensors = own.transition, own.offset
    packed = torch.cat([x.flatten() for x in tensors])[None]
    sizes = [x.numel() for x in tensors]
    gathered = all_gather(packed, ranks.group.ranks).split(sizes, dim=1)  # all-gather over cp
    transition, offset = (
        x.unflatten(1, one.shape) for x, one in zip(gathered, tensors, strict=True)
    )
    maps = Maps(transition, None, offset)
    if own.change is not None:
        maps = Maps(torch.zeros_like(transition[..., :1, :1]), transition, offset)
    offsets = combined(maps, offset.dtype)[0].offset  # of the maps before each rank but the first
    before = torch.cat([torch.zeros_like(offsets[:1]), offsets])
    return before.index_select(0, ranks.place)[0]


def map_elements(rows: int, heads: int, key_dim: int, value_dim: int, scalar: bool = False) -> int:
    """Return the number of elements in a rank's message: for each row and head its map.

    ``scalar``: the transition is a number, not a matrix."""
    transition = 1 if scalar else key_dim * key_dim
    return rows * heads * (transition + key_dim * value_dim)
