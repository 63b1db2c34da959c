"""What a program on DTensors needs that DTensor does not do, or does too much of.

DTensor tracks *where* a tensor lies: cut along a dim, whole on every rank, or a sum still pending. Each
function here is about one of these, takes a plain tensor too (one device), and says what it communicates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate


class Gather(torch.autograd.Function):
    """All-gather a weight; reduce-scatter its gradient over the gathered axes only.

    ``DTensor.redistribute`` would in backward also reduce over the axes that were replicated all along
    (dp_replicate, cp, and tp for a norm's scale), once per microbatch and before the reduce-scatter, on the
    whole weight. Left Partial, those sums wait for the end of the step.
    """

    @staticmethod
    def forward(ctx, w: DTensor, placements: tuple[Placement, ...], dtype: torch.dtype, reduce: torch.dtype):
        ctx.before, ctx.reduce = w.placements, reduce
        w = w.to(dtype)
        return w.redistribute(w.device_mesh, placements)

    @staticmethod
    def backward(ctx, g: DTensor):
        return _scatter(cast(g, ctx.reduce), ctx.before), None, None, None


def _scatter(g: DTensor, placements: Sequence[Placement]) -> DTensor:
    target = [p if p.is_shard() else now for p, now in zip(placements, g.placements, strict=True)]
    return g if tuple(target) == g.placements else g.redistribute(g.device_mesh, target)


def scatter(g: Tensor, w: Tensor) -> Tensor:
    """Reduce-scatter a gradient to where its weight is sharded; what is Partial over other axes stays so."""
    return _scatter(g, w.placements) if isinstance(g, DTensor) else g


def reduce(g: Tensor, w: Tensor) -> Tensor:
    """Bring a gradient to the placements of its weight: what shrinks it first, then the remaining sums."""
    return scatter(g, w).redistribute(g.device_mesh, w.placements) if isinstance(g, DTensor) else g


def local(x: Tensor) -> Tensor:
    """This rank's part, sharing memory. Not for use under autograd: a local region says where gradients
    lie."""
    return x.to_local() if isinstance(x, DTensor) else x


def cast(x: Tensor, dtype: torch.dtype, copy: bool = False) -> Tensor:
    """``x.to(dtype)`` that leaves a pending sum pending: DTensor's own would reduce it first, silently."""
    if not isinstance(x, DTensor):
        return x.to(dtype, copy=copy)
    if x.dtype == dtype and not copy:
        return x
    part = x.to_local().to(dtype, copy=copy)
    return DTensor.from_local(
        part, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride()
    )


def shard(x: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A tensor that every rank holds whole, cut. Communicates nothing. Copies, because simulated ranks would
    share x's memory, and an update in place would happen once per rank."""
    own = torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
    whole = DTensor.from_local(own, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(mesh, placements)


def shard_like(x: Tensor, y: Tensor) -> Tensor:
    """x, which every rank holds whole, placed as the gradient of y is: as y, and whole where y is a pending
    sum."""
    if not isinstance(y, DTensor):
        return x
    return shard(x, y.device_mesh, [Replicate() if p.is_partial() else p for p in y.placements])


def full(x: Tensor) -> Tensor:
    """The whole of a tensor, on every rank; a plain tensor on one device and from simulated ranks too."""
    if isinstance(x, DTensor):
        x = x.full_tensor()
    return x.reconcile() if hasattr(x, "reconcile") else x


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
