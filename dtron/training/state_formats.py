"""Optimizer state and master weights in few bits.

    --optim.moments bfloat16           2 bytes for an element of a moment, not 4
    --optim.moments float8             1 byte, and 1 byte for each block of 32 elements
    --optim.master-weights split       2 bytes beside the bfloat16 weight, not 4

A kernel of the optimizer reads a tensor in few bits, computes in float32, and rounds the result
when it writes (``load``, ``write``).

A moment is rounded at random (stochastic_rounding.py), so that it is right on average.

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
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dtron.distributed.redistribute import ShardSpec, to_local
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

    @property
    def unblocked_dim(self) -> int | None:
        """In float8 the dim along which blocks lie, unless the view has a dim for a block."""
        if self.more is None or self.is_split:
            return None
        dim = blocked_dim(self.data.shape, self.more.shape)
        return None if self.data.shape[dim] == BLOCK else dim

    def in_blocks(self, dim: int) -> Stored:
        """View the tensors with a dim for the blocks and one for the elements of a block."""
        if self.more is None or self.is_split:
            return Stored(in_blocks(self.data, dim), in_blocks(self.more, dim), self.root)
        return Stored(in_blocks(self.data, dim), self.more.unsqueeze(dim + 1), self.root)


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
    if (dim := x.unblocked_dim) is not None:
        return load(x.in_blocks(dim)).flatten(dim, dim + 1)
    return scaled(x.data, x.more, x.root)


def scaled(data: Tensor, exponents: Tensor, root: bool) -> Tensor:
    """Return the values of float8 numbers. ``exponents`` has the exponent of the scale of each."""
    y = data.float() * _power(exponents)
    return y * y if root else y


def write(x: Stored, new: Tensor, ok: Tensor, random: Tensor | None = None) -> None:
    """Overwrite the values, unless ``ok`` is false.

    ``random``: 16 random bits for each element, int32, if the values are stored in few bits."""
    if (dim := x.unblocked_dim) is not None:
        write(x.in_blocks(dim), in_blocks(new, dim), ok, in_blocks(random, dim))
        return
    if x.is_split:
        parts: tuple[Tensor, ...] = split(new)
    elif not x.in_few_bits:
        parts = (new,)
    else:
        assert random is not None
        if x.more is None:
            parts = (_to_bfloat16(new.float(), random),)
        else:
            dim = blocked_dim(x.data.shape, x.more.shape)
            parts = _to_float8(new.float(), random, dim, x.root)
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


def in_blocks(x: Any, dim: int) -> Any:
    """View a tensor with a dim for the blocks and one for the elements of a block."""
    return None if x is None else x.unflatten(dim, (-1, BLOCK))


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
    """Return e4m3 numbers and the exponents of their blocks.

    ``dim``: the dim of the elements of a block."""
    x = x.sqrt() if root else x
    exponents = _exponents(x.abs().amax(dim, keepdim=True))
    y = x * _power(-exponents)
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


def blocked_dim(whole: Sequence[int], blocks: Sequence[int]) -> int:
    """Return the dim along which blocks lie, from the shape of a tensor and that of its scales."""
    return next(i for i, (a, b) in enumerate(zip(whole, blocks, strict=True)) if a != b)


def split_tensor(x: Tensor) -> Stored:
    """Split a float32 tensor, which may be a DTensor, into bfloat16 and 16 bits more. Raises
    ValueError for another dtype."""
    if x.dtype != torch.float32:
        raise ValueError(f"a tensor in {x.dtype} cannot be split, only one in float32")
    if not isinstance(x, DTensor):
        return Stored(*split(x))
    spec, mesh = ShardSpec.of(x), x.device_mesh
    high, low = split(to_local(x))
    return Stored(spec.to_dtensor(high, mesh), spec.to_dtensor(low, mesh))
