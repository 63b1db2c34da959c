"""One weight that a compiled unit all-gathers under ZeRO-3, and its gradient.

training/zero3_prefetch.py says when the messages are sent. This file has the messages of one
weight: an all-gather of shards, in the compute dtype or in 8 bits, and an exchange of the
gradient's summands, which the receiving rank adds up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import Placement

from dtron.distributed.collectives import start_exchange, start_reduce_scatter
from dtron.distributed.redistribute import (
    ShardSpec,
    Unshard,
    cast,
    dim_of,
    equal_parts,
    reduce_scatter,
)
from dtron.mesh import Layout
from dtron.tree import Leaf


class Saved(Protocol):
    """Saves the tensors of a unit for backward, without its gathered weights."""

    def pack(self, x: Tensor) -> Any: ...

    def unpack(self, saved: Any) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class LocalWeight(Leaf):
    """A weight between units: this rank's local tensor, which autograd differentiates by, and the
    spec of the DTensor that a unit makes of it.

    ``unit``: the weights of the unit that has all-gathered it (None: it is not all-gathered).
    ``messages``: a weight that was all-gathered in 8 bits, as it arrived. A unit unpacks it, and
        ``local`` only carries its gradient."""

    local: Tensor
    spec: ShardSpec
    unit: Saved | None = None
    messages: PackedWeight | None = None


class PackedWeight(NamedTuple):
    """The messages of all ranks of a weight that was all-gathered in 8 bits.

    ``rows``: one message each.
    ``shape``: the shape of a rank's shard.
    ``dim``: the dim that is sharded."""

    rows: Tensor
    shape: torch.Size
    dim: int


class GatheredWeight:
    """One weight that a unit all-gathers.

    ``index``: its index in the unit's tree.
    ``goal``: its placements after the all-gather.
    ``fp8``: it is all-gathered in 8 bits."""

    def __init__(
        self,
        layout: Layout,
        index: int,
        weight: LocalWeight,
        goal: tuple[Placement, ...],
        fp8: bool,
    ):
        self.layout, self.index, self.weight, self.goal = layout, index, weight, goal
        spec, mesh = weight.spec, layout.mesh
        assert mesh is not None
        self.dtype = layout.compute_dtype(weight.local)
        self.reduce = layout.summed(weight.local)
        self.axes = [i for i in range(mesh.ndim) if spec.placements[i] != goal[i]]
        whole = weight.spec.to_dtensor(weight.local.detach(), mesh)
        self.equal = equal_parts(whole, spec.placements)
        self.axis, self.dim = self.axes[-1], dim_of(spec.placements[self.axes[-1]])
        self.one_message, self.fp8 = self.equal and len(self.axes) == 1, fp8
        self.packed = fp8 and self.one_message

    def part(self) -> Tensor:
        """Return this rank's shard in the compute dtype."""
        return self.weight.local.detach().to(self.dtype).contiguous()

    def arrived(self, rows: Tensor) -> Tensor:
        """Return the whole weight, given the shards of all ranks. In 8 bits, return the messages
        of all ranks, given these messages concatenated."""
        mesh, dim = self.layout.mesh, self.dim
        assert mesh is not None
        rows = rows.unflatten(0, (mesh.size(self.axis), -1))
        return rows if self.packed else rows.movedim(0, dim).flatten(dim, dim + 1).contiguous()

    def carrier(self, x: Tensor) -> Tensor:
        """Return the tensor whose gradient is the whole weight's, given the result of
        ``arrived``."""
        if not self.packed:
            return x
        shape = list(self.weight.local.shape)
        shape[self.dim] *= len(x)
        return x.new_empty((), dtype=self.dtype).expand(shape)

    def gathered(self, x: Tensor, carrier: Tensor, unit: Saved) -> LocalWeight:
        """Return the whole weight for the unit.

        ``x``: the result of ``arrived``."""
        spec = replace(self.weight.spec, placements=self.goal)
        shape = self.weight.local.shape
        packed = PackedWeight(x, shape, self.dim) if self.packed else None
        return LocalWeight(carrier, spec, unit, packed)

    def gather(self) -> Tensor:
        """All-gather the weight by itself: over several axes, or where shards are unequal."""
        assert self.layout.mesh is not None
        w = self.weight.spec.to_dtensor(self.weight.local.detach(), self.layout.mesh)
        return Unshard.apply(w, self.goal, self.dtype, self.reduce, self.fp8).to_local()

    def start_reduce(self, g: Tensor) -> tuple[Tensor, Tensor | None, Tensor] | None:
        """Send the summands of a gradient. Return a buffer for the sum, this rank's own summand,
        and the summands that arrive (without an own one: the sum). None: one message is not
        enough."""
        mesh, dim = self.layout.mesh, self.dim
        assert mesh is not None
        if not self.one_message:
            return None
        rows = g.unflatten(dim, (mesh.size(self.axis), -1)).movedim(dim, 0)
        total = torch.empty_like(self.weight.local)
        if g.dtype.itemsize < self.reduce.itemsize:
            return total, *start_exchange(rows, mesh, self.axis)
        sums = start_reduce_scatter(rows.flatten(0, 1).contiguous(), mesh, self.axis)
        return total, None, sums

    def reduced(self, g: Tensor) -> Tensor:
        """Reduce-scatter a gradient by itself."""
        spec = replace(self.weight.spec, placements=self.goal).gradient
        assert self.layout.mesh is not None
        whole = spec.to_dtensor(g, self.layout.mesh)
        before = self.weight.spec.placements
        return cast(reduce_scatter(whole, before, self.reduce), self.reduce).to_local()
