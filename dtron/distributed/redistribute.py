"""What a program on DTensors needs that DTensor does not do, or does too much of.

DTensor tracks *where* a tensor lies: cut along a dim, whole on every rank, or a sum still pending.
Each function here is about one of these, takes a plain tensor too (one device), and says what it
communicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from dtron.distributed.collectives import exchange_rows, gather_along
from dtron.distributed.fp8_all_gather import packed, unpacked
from dtron.errors import PlacementError
from dtron.torch_compile import opaque

# Two functions here decide in backward by where the gradient lies, and a compiler is to see them
# late; their arguments are then no placements, but numbers.


def code(placements: Sequence[Placement]) -> tuple[int, ...]:
    """Placements as numbers: the dim of a shard, -1 for whole, -2 for a pending sum."""
    return tuple(
        p.dim if isinstance(p, Shard) else -1 if p.is_replicate() else -2 for p in placements
    )


def _decode(numbers: Sequence[int]) -> tuple[Placement, ...]:
    return tuple(Shard(n) if n >= 0 else Replicate() if n == -1 else Partial() for n in numbers)


@opaque
class Unshard(torch.autograd.Function):
    """All-gather a weight to placements (as ``code``); reduce-scatter its gradient over these axes
    only.

    ``DTensor.redistribute`` would in backward also reduce over the axes that were replicated all
    along (for most weights dp_replicate, for a norm's scale every axis), once per microbatch and
    before the reduce-scatter, on the whole weight. Left Partial, those sums wait for the end of the
    step. ``narrow``: sent in 8 bits where parts are equal (distributed/fp8_all_gather.py).
    """

    @staticmethod
    def forward(
        ctx,
        w: DTensor,
        placements: tuple[int, ...],
        dtype: torch.dtype,
        reduce: torch.dtype,
        narrow: bool,
    ):
        ctx.before, ctx.reduce = w.placements, reduce
        goal = _decode(placements)
        narrow = narrow and w.placements != goal and equal_parts(w, w.placements)
        return (_gathered_narrow if narrow else _gathered)(w.to(dtype), goal)

    @staticmethod
    def backward(ctx, g: DTensor):
        return cast(scatter(g, ctx.before, ctx.reduce), ctx.reduce), None, None, None, None


def _gathered(x: DTensor, goal: Sequence[Placement]) -> DTensor:
    """Brought there one mesh axis after the other. In one step torch (2.11 to 2.13) would gather
    over several axes at once if there is a group of just these ranks; and where pieces of pieces
    are not of one size, it would take them for those of one cut: other values, silently."""
    for axis in reversed(range(x.device_mesh.ndim)):
        if x.placements[axis] != goal[axis]:
            x = x.redistribute(
                x.device_mesh, [*x.placements[:axis], goal[axis], *x.placements[axis + 1 :]]
            )
    return x


def _gathered_narrow(x: DTensor, goal: Sequence[Placement]) -> DTensor:
    mesh, part = x.device_mesh, x.to_local()
    axes = [axis for axis in range(mesh.ndim) if x.placements[axis] != goal[axis]]
    messages = packed(part)[None]
    for axis in reversed(axes):
        messages = gather_along(messages, mesh, axis)
    sizes = [mesh.size(axis) for axis in axes]
    whole = unpacked(messages.unflatten(0, sizes), part.shape, x.dtype)
    for i, axis in reversed(list(enumerate(axes))):
        dim = x.placements[axis].dim + i  # i axes are still in front of it
        whole = whole.movedim(i, dim).flatten(dim, dim + 1)
    return DTensor.from_local(whole, mesh, goal, run_check=False, shape=x.shape, stride=x.stride())


@dataclass(frozen=True)
class ShardSpec:
    """Where a tensor lies: what makes a DTensor of a rank's part."""

    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    @staticmethod
    def of(x: DTensor) -> ShardSpec:
        return ShardSpec(tuple(x.placements), x.shape, x.stride())

    @property
    def gradient(self) -> ShardSpec:
        """Of a weight: where it is whole, every rank has one summand of its gradient."""
        return replace(
            self, placements=tuple(Partial() if p.is_replicate() else p for p in self.placements)
        )

    def scattered(self, goal: Sequence[Placement]) -> ShardSpec:
        """Of a gradient: after ``reduce_scatter_all``."""
        return replace(self, placements=scattered(self.placements, goal))

    def whole(self, x: Tensor, mesh: DeviceMesh) -> DTensor:
        return DTensor.from_local(
            x, mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )


@opaque
class LocalToDTensor(torch.autograd.Function):
    """A rank's part of a weight becomes a DTensor on the mesh of ``like``; the gradient comes back
    as ``ShardSpec.gradient`` says. ``DTensor.from_local`` would reduce what is pending, in every
    microbatch."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        like: DTensor,
        placements: tuple[int, ...],
        shape: Sequence[int],
        stride: Sequence[int],
    ) -> DTensor:
        lies = ShardSpec(_decode(placements), torch.Size(shape), tuple(stride))
        ctx.placements = lies.gradient.placements
        return lies.whole(x, like.device_mesh)

    @staticmethod
    def backward(ctx, g: DTensor):
        if tuple(g.placements) != ctx.placements:
            raise PlacementError(
                f"the gradient of a weight lies {g.placements}, not {ctx.placements}: every rank must have a "
                "summand of it where the weight is whole; constrain what it multiplies to tokens_sp"
            )
        return g.to_local(), None, None, None, None


def scattered(now: Sequence[Placement], goal: Sequence[Placement]) -> tuple[Placement, ...]:
    return tuple(b if b.is_shard() else a for a, b in zip(now, goal, strict=True))


def scatter(g: DTensor, goal: Sequence[Placement], dtype: torch.dtype) -> DTensor:
    """Where a sum is to have more bits than its summands, these are sent as they are, and added up
    where they land: the same sum, from half the bytes of a reduce-scatter in float32 for
    bfloat16."""
    target = scattered(g.placements, goal)
    for axis, (now, then) in enumerate(zip(g.placements, target, strict=True)):
        if (
            now.is_partial()
            and now != then
            and g.dtype.itemsize < dtype.itemsize
            and _even(g, axis, target)
        ):
            g = _land(g, axis, then.dim, dtype)
    return g if target == g.placements else cast(g, dtype).redistribute(g.device_mesh, target)


def equal_parts(x: DTensor, placements: Sequence[Placement]) -> bool:
    """Whether x, cut as these placements say, has parts of one size on all ranks; others are padded
    before they are sent."""
    size = list(x.shape)
    for axis, at in enumerate(placements):
        if at.is_shard():
            n = x.device_mesh.size(axis)  # torch 2.11 does not trace a mesh's shape
            if size[at.dim] % n:
                return False
            size[at.dim] //= n
    return True


def part_of(
    shape: Sequence[int], mesh: DeviceMesh | None, placements: Sequence[Placement]
) -> list[float]:
    """The shape of a rank's part, with fractions where the mesh does not divide: every rank must
    decide alike."""
    part = list(shape)
    for axis, p in enumerate(placements):
        if isinstance(p, Shard):
            part[p.dim] /= mesh.size(axis)
    return part


def _even(g: DTensor, axis: int, target: Sequence[Placement]) -> bool:
    """Whether the next cut of a dim is that over this mesh axis, of each rank's part into equal
    pieces."""
    dim = target[axis].dim
    inner = any(p.is_shard(dim) for p in g.placements[axis + 1 :])
    outer = any(
        a != b and b.is_shard(dim) for a, b in zip(g.placements[:axis], target[:axis], strict=True)
    )
    return not inner and not outer and g.to_local().shape[dim] % g.device_mesh.size(axis) == 0


def _land(g: DTensor, axis: int, dim: int, dtype: torch.dtype) -> DTensor:
    mesh = g.device_mesh
    own, others = exchange_rows(
        g.to_local().unflatten(dim, (mesh.size(axis), -1)).movedim(dim, 0), mesh, axis
    )
    landed = own.to(dtype) + others.sum(0, dtype=dtype)
    placements = [Shard(dim) if i == axis else p for i, p in enumerate(g.placements)]
    return DTensor.from_local(
        landed, mesh, placements, run_check=False, shape=g.shape, stride=g.stride()
    )


def local(x: Tensor) -> Tensor:
    """This rank's part, sharing memory. Not for use under autograd: a local region says where
    gradients lie."""
    if not isinstance(x, DTensor):
        return x
    with torch.no_grad():
        return x.to_local()


def like(x: Tensor, part: Tensor) -> Tensor:
    """A tensor that lies as x does, of which this rank's part is ``part``, on any device. By
    DTensor's constructor, which is not public, because ``from_local`` would move the part to the
    mesh's device."""
    return DTensor(part, x._spec, requires_grad=False) if isinstance(x, DTensor) else part


def cast(x: Tensor, dtype: torch.dtype, copy: bool = False) -> Tensor:
    """``x.to(dtype)`` that leaves a pending sum pending: DTensor's own may reduce it first."""
    if not isinstance(x, DTensor):
        return x.to(dtype, copy=copy)
    if x.dtype == dtype and not copy:
        return x
    part = x.to_local().to(dtype, copy=copy)
    return DTensor.from_local(
        part, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride()
    )


def shard(x: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A tensor that every rank holds whole, cut. Communicates nothing. Copies, because simulated
    ranks would share x's memory, and an update in place would happen once per rank."""
    own = torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
    whole = DTensor.from_local(own, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(mesh, placements)


def shard_like(x: Tensor, y: Tensor) -> Tensor:
    """x, which every rank holds whole, placed as the gradient of y is: as y, and whole where y is a
    pending sum."""
    if not isinstance(y, DTensor):
        return x
    return shard(x, y.device_mesh, [Replicate() if p.is_partial() else p for p in y.placements])


def full(x: Tensor) -> Tensor:
    """The whole of a tensor, on every rank; a plain tensor on one device and from simulated ranks
    too."""
    if isinstance(x, DTensor):
        x = _gathered(x, [Replicate()] * x.device_mesh.ndim).to_local()
    return x.reconcile() if hasattr(x, "reconcile") else x


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
