"""An optimizer whose moments and master weights take fewer bytes (formats: state_formats.py).

    bytes of a weight            float32   bfloat16 moments   float8 moments
    weight that computes               2                  2                2
    float32 master weight              4                  4                4
    or: low bits of a split one        2                  2                2
    moments of AdamW                   8                  4             2.06

``LowBitState`` is an optimizer itself. It makes the state of another one and stores it in these
formats. The other one updates it: its kernels read and write any format.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import ShardSpec, cast, dim_of, to_local
from dtron.errors import UserError
from dtron.params import WeightSpec
from dtron.rules import place, rules_for
from dtron.training.optimizer import (
    Optimizer,
    WrappedOptimizer,
    find,
    init_each,
    innermost,
)
from dtron.training.state_formats import (
    BLOCK,
    MASTERS_LOW,
    ROOT_SCALES,
    SCALES,
    Stored,
    split_tensor,
)
from dtron.tree import flat

Moments = Literal["float32", "bfloat16", "float8"]
Masters = Literal["float32", "split"]


@dataclass(frozen=True)
class LowBitState(WrappedOptimizer):
    """An optimizer with its state in few bits.

    ``moments``: the format of its state.
    ``masters``: the format of master weights."""

    moments: Moments
    masters: Masters

    def init(self, spec: Any, params: Any) -> dict[str, Any]:
        """Make the trees of the state. ``params`` are in float32; see ``stored_params``."""
        squares = innermost(self.base).squares

        def init(w: WeightSpec, x: Tensor) -> dict[str, Any]:
            trees: dict[str, Any] = {}
            for name, (zeros,) in self.base.init((w,), (x,)).items():
                stored = None if zeros is None else self._stored(w, zeros)
                trees[name] = (None if stored is None else stored.data,)
                if stored is not None and stored.more is not None:
                    scales = ROOT_SCALES if name in squares else SCALES
                    trees[f"{name}{scales}"] = (stored.more,)
            if self.masters == "split" and not w.buffer:
                trees[MASTERS_LOW] = (split_tensor(x).more,)
            return trees

        return init_each(spec, params, init)

    def _stored(self, w: WeightSpec, zeros: Tensor) -> Stored:
        if not self._in_few_bits(w):
            return Stored(zeros)
        if self.moments == "bfloat16":
            return Stored(cast(zeros, torch.bfloat16))
        dim = block_dim(w.shape)
        assert dim is not None
        return zeros_in_blocks(zeros, dim)

    def check(self, spec: Any, shape: MeshShape, zero: int, compute: torch.dtype) -> None:
        """Raise UserError for weights that cannot be stored so; see ``check_formats``."""
        if self.masters == "split" and compute != torch.bfloat16:
            raise UserError(
                f"optim.master_weights=split: splits float32 into bfloat16 and 16 bits more, and "
                f"the weights compute in {str(compute).removeprefix('torch.')}; use --dtype "
                "bfloat16, or leave it out"
            )
        atoms = {axis: n for axis, n in shape.atoms.items() if axis != "pp"}
        sizes = list(atoms.values())
        for w in flat(spec) if self.moments == "float8" else ():
            dim = block_dim(w.shape)
            if not self._in_few_bits(w) or dim is None:
                continue
            placements = enumerate(place(rules_for(zero), list(atoms), *w.axes))
            shards = math.prod(sizes[i] for i, p in placements if p.is_shard() and dim_of(p) == dim)
            if w.shape[dim] % (shards * BLOCK):
                raise UserError(
                    f"optim.moments=float8: {w.path} is {list(w.shape)}, and its {shards} shards "
                    f"along dim {dim} are not whole blocks of {BLOCK}; use --optim.moments bfloat16"
                )

    def _in_few_bits(self, w: WeightSpec) -> bool:
        """Whether the moments of a weight are in few bits. Norms and biases are small."""
        matrix = len(w.shape) > 1 and not w.buffer
        blocks = self.moments != "float8" or block_dim(w.shape) is not None
        return matrix and self.moments != "float32" and blocks

    def state_bytes(self, w: WeightSpec, shape: Sequence[int], element: int) -> int:
        count, low = math.prod(shape), self.masters == "split" and not w.buffer
        low_bytes = 2 * count if low else 0
        if not self._in_few_bits(w):
            return low_bytes + self.base.state_bytes(w, shape, element)
        elements = self.base.state_bytes(w, shape, 1)
        if self.moments == "bfloat16":
            return low_bytes + 2 * elements
        return low_bytes + elements + elements // BLOCK


def check_formats(
    optimizer: Optimizer, spec: Any, shape: MeshShape, zero: int, compute: torch.dtype
) -> None:
    """Raise UserError if the weights of a mesh cannot be stored in the optimizer's formats.

    ``zero``: the ZeRO stage.
    ``compute``: the dtype in which the weights compute."""
    if (low := find(optimizer, LowBitState)) is not None:
        low.check(spec, shape, zero, compute)


def master_bytes(optimizer: Optimizer, w: WeightSpec, element: int) -> int:
    """Return the bytes of an element of the weight that an optimizer updates.

    ``element``: the bytes of a master weight that is not split."""
    low = find(optimizer, LowBitState)
    return 2 if low is not None and low.masters == "split" and not w.buffer else element


def block_dim(shape: Sequence[int]) -> int | None:
    """Return the dim along which the blocks of a weight's moments lie: the last dim that is a
    multiple of a block. None: there is no such dim, and the moments stay in float32."""
    dims = [i for i, n in enumerate(shape) if n % BLOCK == 0]
    return dims[-1] if dims else None


def zeros_in_blocks(x: Tensor, dim: int) -> Stored:
    """Return zeros in float8 with the shape and placements of x, whose blocks lie along a dim."""
    part = to_local(x)
    data = torch.zeros_like(part).to(torch.float8_e4m3fn)
    first = part.unflatten(dim, (-1, BLOCK)).select(dim + 1, 0)
    scales = torch.zeros_like(first, memory_format=torch.contiguous_format).to(torch.int8)
    if not isinstance(x, DTensor):
        return Stored(data, scales)
    shape = [n // BLOCK if i == dim else n for i, n in enumerate(x.shape)]
    stride = torch.empty(shape, device="meta").stride()
    of_scales = ShardSpec(tuple(x.placements), torch.Size(shape), stride)
    return Stored(
        ShardSpec.of(x).to_dtensor(data, x.device_mesh), of_scales.to_dtensor(scales, x.device_mesh)
    )
