"""Patterns that map the dims of a Hugging Face tensor to the dims of a dtron weight.

The notation follows einops. The Hugging Face tensor is on the left, the dtron weight on the
right:

    "(n h) d -> d n h"        [heads * head_dim, embed] becomes [embed, heads, head_dim]
    "d (1/3 n h) -> d n h"    the weight is the second of three parts of the tensor
    "e d (f 0/2) -> e d f"    the weight is every second column of the tensor
    "f d -> e d f"            the tensor has no axis e: there is one tensor for each e, named by it
    "(n h + [k h]) d -> ..."  the tensor concatenates weights of several sizes; ours is in brackets

A pattern works in both directions. It also gives the box of the Hugging Face tensor (one range per
dim) that contains a *shard* of the weight. So a rank reads only its shard.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from dtron.checkpoint.shard_range import Range

Axes = tuple[str, ...]


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern.

    ``theirs``: the axes that make up each dim of the Hugging Face tensor, outermost first.
    ``ours``: the axis of each dim of the dtron weight.
    ``before``, ``after``: for each dim of the Hugging Face tensor, the axes of the other weights
        that it concatenates, before and after this one."""

    theirs: tuple[Axes, ...]
    ours: Axes
    before: tuple[tuple[Axes, ...], ...] = ()
    after: tuple[tuple[Axes, ...], ...] = ()

    @property
    def outside(self) -> tuple[str, ...]:
        """The axes that are not dims of the Hugging Face tensor, but are part of its name."""
        inside = {axis for dim in self.theirs for axis in dim}
        return tuple(axis for axis in self.ours if axis not in inside)

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape of the Hugging Face tensor."""
        parts = zip(self.before, self.theirs, self.after, strict=True)
        return tuple(_total((*a, dim, *b), sizes) for a, dim, b in parts)

    def box(self, ranges: Mapping[str, Range], sizes: Mapping[str, int]) -> list[Range]:
        """Return the ranges of the Hugging Face dims that contain these ranges of dtron's axes.

        In a dim of several axes, the outermost axis whose range has more than one index determines
        the range of the dim. ``take`` slices the axes inside it."""
        dims = zip(self.theirs, self.before, strict=True)
        return [self._range(dim, _total(before, sizes), ranges, sizes) for dim, before in dims]

    def _range(
        self, dim: Axes, start: int, ranges: Mapping[str, Range], sizes: Mapping[str, int]
    ) -> Range:
        unit = _total((dim,), sizes)
        for axis in dim:
            unit //= _size(axis, sizes)
            a, b = _within(axis, ranges)
            start += a * unit
            if b - a != 1:
                return start, start + (b - a) * unit
        return start, start + 1

    def take(self, x: Tensor, ranges: Mapping[str, Range], sizes: Mapping[str, int]) -> Tensor:
        """Return the shard of the dtron weight, without the axes outside, from the Hugging Face
        tensor's ``box``."""
        shape, slices = [], []
        for dim in self.theirs:
            sliced = True  # whether ``box`` has sliced this axis: all axes before have one index
            for axis in dim:
                a, b = _within(axis, ranges)
                shape.append(b - a if sliced else _size(axis, sizes))
                slices.append(slice(None) if sliced else slice(a, b))
                sliced = sliced and b - a == 1
        return self._to_ours(x.reshape(shape)[tuple(slices)])

    def _to_ours(self, x: Tensor) -> Tensor:
        """Permute a tensor with one dim for each Hugging Face axis to dtron's order of axes. Axes
        like ``1/3`` have size 1 and are dropped."""
        axes = [axis for dim in self.theirs for axis in dim]
        parts = [i for i, axis in enumerate(axes) if "/" in axis]
        names = [axis for axis in axes if "/" not in axis]
        x = x[tuple(0 if i in parts else slice(None) for i in range(len(axes)))]
        return x.permute([names.index(axis) for axis in self.ours if axis in names])

    def put(self, out: Tensor, x: Tensor, sizes: Mapping[str, int]) -> None:
        """Write the whole dtron weight ``x``, without the axes outside, into its place in the
        Hugging Face tensor ``out``."""
        axes = [axis for dim in self.theirs for axis in dim]
        for i, (dim, before) in enumerate(zip(self.theirs, self.before, strict=True)):
            out = out.narrow(i, _total(before, sizes), _total((dim,), sizes))
        whole = out.view([_size(axis, sizes) for axis in axes])
        part = whole[tuple(int(a.split("/")[0]) if "/" in a else slice(None) for a in axes)]
        names = [axis for axis in axes if "/" not in axis]
        ours = [axis for axis in self.ours if axis in names]
        part.copy_(x.permute([ours.index(axis) for axis in names]))


def _total(parts: Sequence[Axes], sizes: Mapping[str, int]) -> int:
    """Return the size of a dim that concatenates these parts."""
    return sum(math.prod(_size(axis, sizes) for axis in part) for part in parts)


def _size(axis: str, sizes: Mapping[str, int]) -> int:
    return int(axis.split("/")[1]) if "/" in axis else sizes[axis]


def _within(axis: str, ranges: Mapping[str, Range]) -> Range:
    if "/" not in axis:
        return ranges[axis]
    place = int(axis.split("/")[0])
    return place, place + 1


@cache
def pattern(text: str) -> Pattern:
    """Parse a pattern."""
    left, _, right = text.partition("->")
    dims = [a or b for a, b in re.findall(r"\(([^)]*)\)|(\S+)", left)]
    theirs, before, after = [], [], []
    for dim in dims:
        parts = [tuple(part.strip(" []").split()) for part in dim.split("+")]
        own = next((i for i, part in enumerate(dim.split("+")) if "[" in part), 0)
        theirs.append(parts[own])
        before.append(tuple(parts[:own]))
        after.append(tuple(parts[own + 1 :]))
    return Pattern(tuple(theirs), tuple(right.split()), tuple(before), tuple(after))


def halves(x: Tensor, rotary: int) -> Tensor:
    """Reorder the last ``rotary`` columns from interleaved pairs (0, 1), (2, 3), ... to pairs that
    are half the width apart, as dtron's RoPE rotates them."""
    plain, rotated = x.split([x.shape[-1] - rotary, rotary], dim=-1)
    return torch.cat([plain, rotated[..., 0::2], rotated[..., 1::2]], dim=-1)


def pairs(x: Tensor, rotary: int) -> Tensor:
    """Undo ``halves``."""
    plain, rotated = x.split([x.shape[-1] - rotary, rotary], dim=-1)
    return torch.cat([plain, rotated.unflatten(-1, (2, -1)).mT.flatten(-2)], dim=-1)
