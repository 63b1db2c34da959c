"""Optimizer state and master weights in few bits.

    --optim.moments bfloat16           2 bytes for an element of a moment, not 4
    --optim.moments float8             1 byte, and 1 byte for each block of 32 elements
    --optim.master-weights split       2 bytes beside the bfloat16 weight, not 4

A kernel of the optimizer reads a tensor in few bits, computes in float32, and rounds the result
when it writes (``load``, ``write``).

**Stochastic rounding.** Near 1 two neighbours of bfloat16 are 1/128 apart. A second moment with
decay 0.999 moves by at most 1/1000 of itself when gradients become small. Rounded to the nearest
number it would never move. So a moment is rounded up with a probability that is its distance from
the lower neighbour. Then it is right on average (Gupta et al. 2015, arXiv:1502.02551).

The random number of an element is a hash of the number of the update, the path of the weight, and
the index of the element in the whole weight. So a mesh does not change the result, and a run that
is resumed rounds as the run that was not interrupted.

**float8** is e4m3, in blocks of 32 elements with a power of two as their scale (Rouhani et al.
2023, arXiv:2310.10537; blocks for optimizer state: Dettmers et al. 2022, arXiv:2110.02861). A
moment of squares is stored by its root: e4m3 has a range of 1 to 230,000 in a block, and squares
need more. A root that is not 0 is never rounded to 0, because the update divides by it. A block
lies along a dim of the whole weight, and a shard consists of whole blocks. So blocks do not depend
on the mesh, and a checkpoint loads on any mesh.

**Split master weights.** A float32 number is a bfloat16 number, which is the weight that computes,
and 16 bits more (Kalamkar et al. 2020, arXiv:2005.04680, section VII). Nothing is lost: training is
that of float32 masters to the bit, but for ties in rounding to bfloat16. The weights are no longer
stored twice.

Norms and biases keep moments in float32, for they are small.

Left out: moments in 4 bits. torchao's blocks, which are parts of a flattened shard: they would
depend on the mesh.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dtron.distributed.redistribute import ShardSpec, to_local
from dtron.mesh import Layout
from dtron.params import WeightSpec
from dtron.tree import flat, unflatten, with_specs

SCALES = "_scale"  # the tree ``m_scale`` has the exponents of the blocks of ``m``
ROOT_SCALES = "_root_scale"  # the same, if ``m`` has the roots of its values
MASTERS_LOW = "master_low"  # the tree of the low 16 bits of split master weights
BLOCK = 32  # elements that share a scale
LARGEST = 448  # of e4m3
_SMALLEST_NORMAL, _SMALLEST = 2.0**-6, 2.0**-9  # of e4m3


class Stored(NamedTuple):
    """A tensor as it is stored.

    ``data``: the values. In float8 each is a multiple of its block's scale.
    ``more``: in float8 the exponents of the scales, int8; for split weights their low 16 bits,
        int16; otherwise None.
    ``root``: in float8 the roots of the values are stored."""

    data: Tensor
    more: Tensor | None = None
    root: bool = False

    @property
    def plain(self) -> bool:
        """Whether the values are stored as they are."""
        return self.more is None and self.data.dtype.itemsize >= 4

    @property
    def in_few_bits(self) -> bool:
        """Whether a write rounds at random."""
        return self.data.dtype.itemsize < 4 and not self.is_split

    @property
    def is_split(self) -> bool:
        return self.more is not None and self.more.dtype == torch.int16

    def local(self) -> Stored:
        """Return this rank's shard."""
        more = None if self.more is None else to_local(self.more)
        return Stored(to_local(self.data), more, self.root)

    def as_matrix(self) -> Stored:
        """View the tensors with at most two dims, so that fewer shapes are compiled."""
        return Stored(as_matrix(self.data), as_matrix(self.more), self.root)


def stored_tree(spec: Any, trees: Mapping[str, Any], name: str) -> list[Any]:
    """Return a ``Stored`` for each weight of ``spec``, from a tree of the state and the tree that
    belongs to it; None for a weight that has no such state."""
    root = f"{name}{ROOT_SCALES}" in trees
    return _paired(
        spec, trees.get(name), trees.get(f"{name}{ROOT_SCALES if root else SCALES}"), root
    )


def stored_weights(spec: Any, params: Any, trees: Mapping[str, Any]) -> list[Any]:
    """Return a ``Stored`` for each weight of ``spec``, from params and state."""
    return _paired(spec, params, trees.get(MASTERS_LOW))


def _paired(spec: Any, tree: Any, more: Any, root: bool = False) -> list[Any]:
    data, beside = ({id(w): x for w, x in with_specs(spec, t)} for t in (tree, more))
    return [
        Stored(data[id(w)], beside.get(id(w)), root) if id(w) in data else None for w in flat(spec)
    ]


def is_part(tree: str) -> bool:
    """Whether a tree of the state only belongs to another one, or to the weights."""
    return tree == MASTERS_LOW or tree.endswith((SCALES, ROOT_SCALES))


def values(spec: Any, params: Any, trees: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return params and state as numbers in float32, or wider if they are stored so. Trees that are
    parts of others are left out."""
    names = [name for name in trees if not is_part(name)]
    found = {name: _values(trees[name], stored_tree(spec, trees, name)) for name in names}
    return _values(params, stored_weights(spec, params, trees)), found


def _values(tree: Any, of_tree: Sequence[Any]) -> Any:
    return unflatten(tree, [_value(x) for x in of_tree if x is not None])


def _value(x: Stored) -> Tensor:
    if x.plain:
        return x.data
    y = load(x.local())
    if not isinstance(x.data, DTensor):
        return y
    return ShardSpec.of(x.data).to_dtensor(y, x.data.device_mesh)


def load(x: Stored) -> Tensor:
    """Return the values, in float32 or in the wider dtype in which they are stored."""
    if x.more is None:
        return x.data.float() if x.data.dtype.itemsize < 4 else x.data
    if x.is_split:
        return join(x.data, x.more)
    dim = blocked_dim(x.data.shape, x.more.shape)
    blocks = x.data.unflatten(dim, (-1, BLOCK))
    return scaled(blocks, x.more.unsqueeze(dim + 1), x.root).flatten(dim, dim + 1)


def scaled(data: Tensor, exponents: Tensor, root: bool) -> Tensor:
    """Return the values of float8 numbers. ``exponents`` has the exponent of the scale of each."""
    y = data.float() * _power(exponents)
    return y * y if root else y


def write(x: Stored, new: Tensor, ok: Tensor, random: Tensor | None = None) -> None:
    """Overwrite the values, unless ``ok`` is false.

    ``random``: 16 random bits for each element, int32, if the values are stored in few bits."""
    if x.is_split:
        parts: tuple[Tensor, ...] = split(new)
    elif not x.in_few_bits:
        parts = (new,)
    else:
        assert random is not None
        if x.more is None:
            parts = (_to_bfloat16(new.float(), random),)
        else:
            parts = _to_float8(new.float(), random, blocked_dim(x.data.shape, x.more.shape), x.root)
    for old, part in zip((x.data, x.more), parts, strict=False):
        assert old is not None
        if part.dtype == torch.float8_e4m3fn:  # torch.where does not take it
            old.copy_(torch.where(ok, part.float(), old.float()))
        else:
            overwrite((old,), (part,), ok)


def overwrite(old: Sequence[Tensor], new: Sequence[Tensor], ok: Tensor) -> None:
    """Overwrite tensors with their new values, unless ``ok`` is false. (A multiplication by 0 would
    not do: NaN times 0 is NaN.)"""
    for x, y in zip(old, new, strict=True):
        x.copy_(torch.where(ok, y, x))


def as_matrix(x: Any) -> Any:
    """View a tensor with at most two dims."""
    return x if x is None or x.ndim < 3 else x.view(x.shape[0], math.prod(x.shape[1:]))


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 numbers into the nearest bfloat16 numbers and their low 16 bits, int16."""
    bits = x.view(torch.int32)
    high = (bits + 0x8000) >> 16
    low = bits - (high << 16)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def join(high: Tensor, low: Tensor) -> Tensor:
    """Return the float32 numbers of which ``split`` made these parts."""
    bits = (high.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)
    return bits.view(torch.float32)


def _to_bfloat16(x: Tensor, random: Tensor) -> Tensor:
    bits = (x.view(torch.int32) + random) & ~0xFFFF
    return bits.view(torch.float32).to(torch.bfloat16)


def _to_float8(x: Tensor, random: Tensor, dim: int, root: bool) -> tuple[Tensor, Tensor]:
    """Return e4m3 numbers and the exponents of their blocks along ``dim``."""
    x = x.sqrt() if root else x
    blocks = x.unflatten(dim, (-1, BLOCK))
    exponents = _exponents(blocks.abs().amax(dim + 1))
    y = (blocks * _power(-exponents).unsqueeze(dim + 1)).flatten(dim, dim + 1)
    # The last 20 bits of a float32 number are below e4m3's last bit. In the range of subnormal
    # numbers the neighbours are _SMALLEST apart.
    normal = ((y.view(torch.int32) + (random << 4)) & ~0xFFFFF).view(torch.float32)
    steps = (y.abs() / _SMALLEST + random / 2.0**16).floor()
    subnormal = torch.copysign(steps * _SMALLEST, y)
    rounded = torch.where(y.abs() < _SMALLEST_NORMAL, subnormal, normal)
    if root:
        rounded = torch.where(y > 0, rounded.clamp(min=_SMALLEST), rounded)
    return rounded.to(torch.float8_e4m3fn), exponents.to(torch.int8)


def _exponents(largest: Tensor) -> Tensor:
    """Return for each block the exponent e for which largest / 2^e is just at most LARGEST, which
    is 1.75 * 2^8."""
    bits = largest.view(torch.int32)
    above = (bits & 0x7FFFFF) > 0x600000  # the mantissa is over 1.75
    return ((bits >> 23) - 127 - 8 + above.to(torch.int32)).clamp(min=-126, max=119)


def _power(exponents: Tensor) -> Tensor:
    """Return 2^e in float32, exactly."""
    return ((exponents.to(torch.int32) + 127) << 23).view(torch.float32)


def random_bits(places: Sequence[Tensor], step: Tensor, draw: int) -> Tensor:
    """Return 16 random bits for each element of a shard, as int32.

    ``places``: see ``places``.
    ``step``: the number of the update.
    ``draw``: the number of the state among those of the weight."""
    x = step.to(torch.int32) * 0x9E3779B + draw * 0x3C6EF372
    for i, place in enumerate(places):
        x = x + place.view([-1] + [1] * (len(places) - 1 - i))
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


def blocked_dim(whole: Sequence[int], blocks: Sequence[int]) -> int:
    """Return the dim along which blocks lie, from the shape of a tensor and that of its scales."""
    return next(i for i, (a, b) in enumerate(zip(whole, blocks, strict=True)) if a != b)


def split_tensor(x: Tensor) -> Stored:
    """Split a float32 tensor, which may be a DTensor, into bfloat16 and 16 bits more."""
    if not isinstance(x, DTensor):
        return Stored(*split(x))
    spec, mesh = ShardSpec.of(x), x.device_mesh
    high, low = split(to_local(x))
    return Stored(spec.to_dtensor(high, mesh), spec.to_dtensor(low, mesh))
