"""Patterns that map the dims of a Hugging Face tensor to the dims of a dtron weight.

The notation follows einops. The Hugging Face tensor is on the left, the dtron weight on the
right:

    "(n h) d -> d n h"        [heads * head_dim, embed] becomes [embed, heads, head_dim]
    "d (1/3 n h) -> d n h"    the weight is the second of three parts of the tensor
    "e d (f 0/2) -> e d f"    the weight is every second column of the tensor
    "f d -> e d f"            the tensor has no axis e: there is one tensor for each e, named by it
    "(n h + [k h]) d -> ..."  the tensor concatenates weights of several sizes; ours is in brackets
    "(g: [c] + c) d -> ..."   the same for each g: parts alternate in the tensor
    "(g r) d -> d (g r)"      the weight has one dim for two axes of the tensor

A pattern works in both directions. It also gives the box of the Hugging Face tensor (one range per
dim) that contains a *shard* of the weight. So a rank reads only its shard.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from dtron.checkpoint.shard_range import Range

Axes = tuple[str, ...]
Ranges = Mapping[str, Range]
Sizes = Mapping[str, int]


class Dim(NamedTuple):
    """One dim of a Hugging Face tensor.

    ``outer``: the outermost axes. For each of their indices the dim concatenates parts.
    ``own``: the axes of the part that is the weight, outermost first.
    ``before``, ``after``: the axes of the other parts."""

    outer: Axes
    own: Axes
    before: tuple[Axes, ...] = ()
    after: tuple[Axes, ...] = ()

    @property
    def axes(self) -> Axes:
        return *self.outer, *self.own

    def parts(self, sizes: Sizes) -> int:
        """Return the size of all parts together."""
        return _total((*self.before, self.own, *self.after), sizes)

    def size(self, sizes: Sizes) -> int:
        return _total((self.outer,), sizes) * self.parts(sizes)

    def box(self, ranges: Ranges, sizes: Sizes) -> Range:
        """Return the range of the dim that contains these ranges of axes. The outermost axis whose
        range has more than one index determines it. ``open`` slices the axes inside this axis."""
        start, unit = 0, self.size(sizes)
        for axes in (self.outer, self.own):
            for axis in axes:
                unit //= _size(axis, sizes)
                a, b = _within(axis, ranges)
                start += a * unit
                if b - a != 1:
                    return start, start + (b - a) * unit
            if axes is self.outer:
                start += _total(self.before, sizes)
                unit = _total((self.own,), sizes)
        return start, start + 1

    def open(self, x: Tensor, i: int, ranges: Ranges, sizes: Sizes) -> Tensor:
        """Replace dim i of the Hugging Face tensor's box by one dim for each axis."""
        shape, slices, sliced = _cut(self.outer, True, ranges, sizes)
        inside = x.shape[i] if sliced else self.parts(sizes)
        x = x.unflatten(i, (*shape, inside))[(slice(None),) * i + slices]
        i += len(self.outer)
        if not sliced:  # the box has whole parts
            x = x.narrow(i, _total(self.before, sizes), _total((self.own,), sizes))
        shape, slices, _ = _cut(self.own, sliced, ranges, sizes)
        return x.unflatten(i, shape)[(slice(None),) * i + slices]

    def part(self, out: Tensor, i: int, sizes: Sizes) -> Tensor:
        """Return the view of the weight in dim i of the whole tensor, with a dim for each axis."""
        outer = [_size(axis, sizes) for axis in self.outer]
        x, i = out.unflatten(i, (*outer, self.parts(sizes))), i + len(outer)
        x = x.narrow(i, _total(self.before, sizes), _total((self.own,), sizes))
        return x.unflatten(i, [_size(axis, sizes) for axis in self.own])


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern.

    ``theirs``: the dims of the Hugging Face tensor.
    ``dims``: the axes of each dim of the dtron weight: one axis, or several."""

    theirs: tuple[Dim, ...]
    dims: tuple[Axes, ...]

    @property
    def ours(self) -> Axes:
        """The axes of all dims of the dtron weight."""
        return tuple(axis for dim in self.dims for axis in dim)

    @property
    def axes(self) -> Axes:
        """The axes of all dims of the Hugging Face tensor. Axes like ``1/3`` have size 1."""
        return tuple(axis for dim in self.theirs for axis in dim.axes)

    @property
    def outside(self) -> tuple[str, ...]:
        """The axes that are not dims of the Hugging Face tensor, but are part of its name."""
        return tuple(axis for axis in self.ours if axis not in self.axes)

    def sizes(self, shape: Sequence[int], known: Sizes) -> dict[str, int]:
        """Return the sizes of the axes of a weight of this shape.

        ``known``: the sizes of all axes but the last of a dim with several axes."""
        out: dict[str, int] = {}
        for axes, n in zip(self.dims, shape, strict=True):
            for axis in axes[:-1]:
                out[axis], n = known[axis], n // known[axis]
            out[axes[-1]] = n
        return out

    def ranges(self, shard: Sequence[Range], sizes: Sizes) -> dict[str, Range]:
        """Return the ranges of the axes of a shard, no further than their sizes. A shard of a dim
        with several axes has whole units of the outermost axis."""
        out: dict[str, Range] = {}
        for (first, *rest), (a, b) in zip(self.dims, shard, strict=True):
            unit = _total((tuple(rest),), sizes)
            out[first] = (min(a // unit, sizes[first]), min(b // unit, sizes[first]))
            out |= {axis: (0, sizes[axis]) for axis in rest}
        return out

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Return the shape of the Hugging Face tensor."""
        return tuple(dim.size(sizes) for dim in self.theirs)

    def box(self, ranges: Ranges, sizes: Sizes) -> list[Range]:
        """Return the ranges of the Hugging Face dims that contain these ranges of dtron's axes."""
        return [dim.box(ranges, sizes) for dim in self.theirs]

    def take(self, x: Tensor, ranges: Ranges, sizes: Sizes) -> Tensor:
        """Return the shard of the dtron weight, without the axes outside, from the Hugging Face
        tensor's ``box``."""
        for i, dim in reversed(list(enumerate(self.theirs))):
            x = dim.open(x, i, ranges, sizes)
        x = x[tuple(0 if "/" in axis else slice(None) for axis in self.axes)]
        names = [axis for axis in self.axes if "/" not in axis]
        x = x.permute([names.index(axis) for axis in self.ours if axis in names])
        for i, axes in enumerate(self._inside):
            x = x.flatten(i, i + len(axes) - 1)
        return x

    def put(self, out: Tensor, x: Tensor, sizes: Sizes) -> None:
        """Write the whole dtron weight ``x``, without the axes outside, into its place in the
        Hugging Face tensor ``out``."""
        for i, dim in reversed(list(enumerate(self.theirs))):
            out = dim.part(out, i, sizes)
        at = (int(a.split("/")[0]) if "/" in a else slice(None) for a in self.axes)
        for i, axes in reversed(list(enumerate(self._inside))):
            x = x.unflatten(i, [sizes[axis] for axis in axes])
        names = [axis for axis in self.axes if "/" not in axis]
        ours = [axis for axis in self.ours if axis in names]
        out[tuple(at)].copy_(x.permute([ours.index(axis) for axis in names]))

    @property
    def _inside(self) -> list[Axes]:
        """The dims of the weight without the axes outside."""
        return [axes for axes in self.dims if axes[0] not in self.outside]


def _cut(
    axes: Axes, sliced: bool, ranges: Ranges, sizes: Sizes
) -> tuple[tuple[int, ...], tuple[slice, ...], bool]:
    """Return the sizes of axes in a box, the slices that remain to be taken, and ``sliced`` for the
    axes inside them.

    ``sliced``: whether all axes so far have one index, so that the box has sliced the next one."""
    shape, slices = [], []
    for axis in axes:
        a, b = _within(axis, ranges)
        shape.append(b - a if sliced else _size(axis, sizes))
        slices.append(slice(None) if sliced else slice(a, b))
        sliced = sliced and b - a == 1
    return tuple(shape), tuple(slices), sliced


def _total(parts: Sequence[Axes], sizes: Sizes) -> int:
    """Return the size of a dim that concatenates these parts."""
    return sum(math.prod(_size(axis, sizes) for axis in part) for part in parts)


def _size(axis: str, sizes: Sizes) -> int:
    return int(axis.split("/")[1]) if "/" in axis else sizes[axis]


def _within(axis: str, ranges: Ranges) -> Range:
    if "/" not in axis:
        return ranges[axis]
    place = int(axis.split("/")[0])
    return place, place + 1


@cache
def pattern(text: str) -> Pattern:
    """Parse a pattern."""
    left, _, right = text.partition("->")
    return Pattern(tuple(map(_dim, _groups(left))), tuple(tuple(d.split()) for d in _groups(right)))


def _groups(text: str) -> list[str]:
    return [a or b for a, b in re.findall(r"\(([^)]*)\)|(\S+)", text)]


def _dim(text: str) -> Dim:
    outer, _, inner = text.rpartition(":")
    parts = [tuple(part.strip(" []").split()) for part in inner.split("+")]
    own = next((i for i, part in enumerate(inner.split("+")) if "[" in part), 0)
    return Dim(tuple(outer.split()), parts[own], tuple(parts[:own]), tuple(parts[own + 1 :]))


def halves(x: Tensor, rotary: int) -> Tensor:
    """Reorder the last ``rotary`` columns from interleaved pairs (0, 1), (2, 3), ... to pairs that
    are half the width apart, as dtron's RoPE rotates them."""
    plain, rotated = x.split([x.shape[-1] - rotary, rotary], dim=-1)
    return torch.cat([plain, rotated[..., 0::2], rotated[..., 1::2]], dim=-1)


def pairs(x: Tensor, rotary: int) -> Tensor:
    """Undo ``halves``."""
    plain, rotated = x.split([x.shape[-1] - rotary, rotary], dim=-1)
    return torch.cat([plain, rotated.unflatten(-1, (2, -1)).mT.flatten(-2)], dim=-1)
