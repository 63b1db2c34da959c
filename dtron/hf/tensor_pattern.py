"""How a tensor of a Hugging Face checkpoint lies beside ours, in the notation of einops.

    "(n h) d -> d n h"        their [heads * head_dim, embed] is our [embed, heads, head_dim]
    "d (1/3 n h) -> d n h"    ours is the second of three parts of theirs
    "e d (f 0/2) -> e d f"    ours is every second column of theirs
    "f d -> e d f"            e is not in theirs: it stands in the name, one tensor for each

A pattern is read both ways. What makes it more than a transposition is that it also answers which
box of their tensor a *part* of ours is made from, so that a rank reads its part alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

Range = tuple[int, int]


@dataclass(frozen=True)
class Pattern:
    """``theirs``: the axes that each of their dims is made of, outermost first. ``ours``: those of each of
    ours."""

    theirs: tuple[tuple[str, ...], ...]
    ours: tuple[str, ...]

    @property
    def outside(self) -> tuple[str, ...]:
        """The axes that stand in their names."""
        inside = {axis for dim in self.theirs for axis in dim}
        return tuple(axis for axis in self.ours if axis not in inside)

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Of their tensor."""
        return tuple(math.prod(_size(axis, sizes) for axis in dim) for dim in self.theirs)

    def box(self, ranges: Mapping[str, Range], sizes: Mapping[str, int]) -> list[Range]:
        """The ranges of their dims that hold these ranges of our axes. A dim of several axes is cut
        by the outermost that has more than one place; axes inside it are cut in ``take``."""
        return [self._range(dim, ranges, sizes) for dim in self.theirs]

    def _range(
        self, dim: tuple[str, ...], ranges: Mapping[str, Range], sizes: Mapping[str, int]
    ) -> Range:
        start, unit = 0, math.prod(_size(axis, sizes) for axis in dim)
        for axis in dim:
            unit //= _size(axis, sizes)
            a, b = _within(axis, ranges)
            start += a * unit
            if b - a != 1:
                return start, start + (b - a) * unit
        return start, start + 1

    def take(self, x: Tensor, ranges: Mapping[str, Range], sizes: Mapping[str, int]) -> Tensor:
        """Our part, without the axes outside, of their ``box``."""
        shape, cuts = [], []
        for dim in self.theirs:
            cut = True  # whether all axes before had one place
            for axis in dim:
                a, b = _within(axis, ranges)
                shape.append(b - a if cut else _size(axis, sizes))
                cuts.append(slice(None) if cut else slice(a, b))
                cut = cut and b - a == 1
        return self._to_ours(x.reshape(shape)[tuple(cuts)])

    def _to_ours(self, x: Tensor) -> Tensor:
        """From one dim for each axis of theirs, parts having one place."""
        axes = [axis for dim in self.theirs for axis in dim]
        parts = [i for i, axis in enumerate(axes) if "/" in axis]
        names = [axis for axis in axes if "/" not in axis]
        x = x[tuple(0 if i in parts else slice(None) for i in range(len(axes)))]
        return x.permute([names.index(axis) for axis in self.ours if axis in names])

    def put(self, out: Tensor, x: Tensor, sizes: Mapping[str, int]) -> None:
        """Write ours, whole and without the axes outside, to where it is in their tensor
        ``out``."""
        axes = [axis for dim in self.theirs for axis in dim]
        whole = out.view([_size(axis, sizes) for axis in axes])
        part = whole[tuple(int(a.split("/")[0]) if "/" in a else slice(None) for a in axes)]
        names = [axis for axis in axes if "/" not in axis]
        ours = [axis for axis in self.ours if axis in names]
        part.copy_(x.permute([ours.index(axis) for axis in names]))


def _size(axis: str, sizes: Mapping[str, int]) -> int:
    return int(axis.split("/")[1]) if "/" in axis else sizes[axis]


def _within(axis: str, ranges: Mapping[str, Range]) -> Range:
    if "/" not in axis:
        return ranges[axis]
    place = int(axis.split("/")[0])
    return place, place + 1


@cache
def pattern(text: str) -> Pattern:
    """Read the notation."""
    left, _, right = text.partition("->")
    dims, dim, inside = [], [], False
    for word in left.replace("(", " ( ").replace(")", " ) ").split():
        if word == "(":
            inside = True
        elif word == ")":
            dims.append(tuple(dim))
            dim, inside = [], False
        elif inside:
            dim.append(word)
        else:
            dims.append((word,))
    return Pattern(tuple(dims), tuple(right.split()))


def halves(x: Tensor, rotary: int) -> Tensor:
    """The last ``rotary`` columns from pairs that stand side by side to pairs half a width apart,
    as dtron turns them."""
    plain, turned = x.split([x.shape[-1] - rotary, rotary], dim=-1)
    return torch.cat([plain, turned[..., 0::2], turned[..., 1::2]], dim=-1)


def pairs(x: Tensor, rotary: int) -> Tensor:
    """The reverse of ``halves``."""
    plain, turned = x.split([x.shape[-1] - rotary, rotary], dim=-1)
    return torch.cat([plain, turned.unflatten(-1, (2, -1)).mT.flatten(-2)], dim=-1)
