"""Redistribution that DTensor lacks, or that DTensor does with too much communication.

DTensor tracks the *placement* of a tensor: sharded along a dim (Shard), whole on every rank
(Replicate), or a sum that is still pending (Partial). The docstring of each function describes its
communication. Functions of a ``Tensor`` also take a plain tensor (one device).
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from dtron.distributed.collectives import exchange_rows, gather_along
from dtron.distributed.fp8_all_gather import packed, unpacked
from dtron.distributed.simulated_ranks import same_on_all
from dtron.errors import PlacementError


class Unshard(torch.autograd.Function):
    """All-gather a weight to the placements ``goal``; in backward, reduce-scatter its
    gradient over the gathered mesh axes only.

    The backward of ``DTensor.redistribute`` would also reduce over the axes that were replicated
    before the all-gather: dp_replicate for most weights, every axis for a norm's scale. This
    reduction would run once per microbatch, before the reduce-scatter, on the unsharded gradient.
    Here the gradient stays Partial over these axes. It is reduced over them once, at the end of the
    step.

    ``fp8``: all-gather in 8 bits if all shards have one size (distributed/fp8_all_gather.py).
    """

    @staticmethod
    def forward(
        ctx: typing.Any,
        w: DTensor,
        goal: tuple[Placement, ...],
        dtype: torch.dtype,
        reduce: torch.dtype,
        fp8: bool,
    ) -> Tensor:
        ctx.before, ctx.reduce = w.placements, reduce
        fp8 = fp8 and w.placements != goal and equal_parts(w, w.placements)
        return (_unshard_fp8 if fp8 else _unshard)(typing.cast(DTensor, w.to(dtype)), goal)

    @staticmethod
    def backward(ctx: typing.Any, g: DTensor) -> tuple[Tensor | None, ...]:
        return cast(reduce_scatter(g, ctx.before, ctx.reduce), ctx.reduce), None, None, None, None


def _unshard(x: DTensor, goal: Sequence[Placement]) -> DTensor:
    """Redistribute x to ``goal``, one mesh axis after another. In a single call, torch (2.11 to
    2.13) all-gathers over several axes at once if a process group of exactly these ranks exists.
    torch then treats nested shards as the shards of one split. If the nested shards have different
    sizes, the result has wrong values, and no error is raised."""
    for axis in reversed(range(x.device_mesh.ndim)):
        if x.placements[axis] != goal[axis]:
            x = x.redistribute(
                x.device_mesh, [*x.placements[:axis], goal[axis], *x.placements[axis + 1 :]]
            )
    return x


def _unshard_fp8(x: DTensor, goal: Sequence[Placement]) -> DTensor:
    mesh, part = x.device_mesh, x.to_local()
    axes = [axis for axis in range(mesh.ndim) if x.placements[axis] != goal[axis]]
    messages = packed(part)[None]
    for axis in reversed(axes):
        messages = gather_along(messages, mesh, axis)
    sizes = [mesh.size(axis) for axis in axes]
    whole = unpacked(messages.unflatten(0, sizes), part.shape, x.dtype)
    for i, axis in reversed(list(enumerate(axes))):
        dim = dim_of(x.placements[axis]) + i  # i dims of ranks still precede the tensor's dims
        whole = whole.movedim(i, dim).flatten(dim, dim + 1)
    return DTensor.from_local(whole, mesh, goal, run_check=False, shape=x.shape, stride=x.stride())


@dataclass(frozen=True)
class ShardSpec:
    """The placements, global shape and stride of a DTensor. A rank's local tensor and its spec make
    the DTensor again (``to_dtensor``)."""

    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    @staticmethod
    def of(x: DTensor) -> ShardSpec:
        return ShardSpec(tuple(x.placements), x.shape, x.stride())

    @property
    def gradient(self) -> ShardSpec:
        """The spec of a weight's gradient, given the weight's spec. The gradient is Partial on each
        mesh axis where the weight is replicated: there every rank has one summand."""
        return replace(
            self, placements=tuple(Partial() if p.is_replicate() else p for p in self.placements)
        )

    def reduce_scattered(self, goal: Sequence[Placement]) -> ShardSpec:
        """The spec of a gradient after ``reduce_scatter_all``."""
        return replace(self, placements=reduce_scattered(self.placements, goal))

    def to_dtensor(self, x: Tensor, mesh: DeviceMesh) -> DTensor:
        return DTensor.from_local(
            x, mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )


class LocalToDTensor(torch.autograd.Function):
    """Make a DTensor from a rank's local tensor of a weight.

    The gradient must have the placements of ``ShardSpec.gradient``. Backward returns the local
    tensor of the gradient. The backward of ``DTensor.from_local`` would reduce pending sums in
    every microbatch."""

    @staticmethod
    def forward(ctx: typing.Any, x: Tensor, mesh: DeviceMesh, spec: ShardSpec) -> DTensor:
        ctx.placements = spec.gradient.placements
        return spec.to_dtensor(x, mesh)

    @staticmethod
    def backward(ctx: typing.Any, g: DTensor) -> tuple[Tensor | None, ...]:
        if tuple(g.placements) != ctx.placements:
            raise PlacementError(
                f"the gradient of a weight has the placements {g.placements}, not "
                f"{ctx.placements}: where the weight is replicated, every rank must have one "
                "summand of the gradient; constrain the activation that the weight multiplies to "
                "tokens_sp"
            )
        return g.to_local(), None, None


def dim_of(p: Placement) -> int:
    """Return the dim that a Shard shards."""
    return typing.cast(Shard, p).dim


def reduce_scattered(now: Sequence[Placement], goal: Sequence[Placement]) -> tuple[Placement, ...]:
    """Return the placements of a gradient after ``reduce_scatter`` to ``goal``."""
    return tuple(b if b.is_shard() else a for a, b in zip(now, goal, strict=True))


def reduce_scatter(g: DTensor, goal: Sequence[Placement], dtype: torch.dtype) -> DTensor:
    """Reduce-scatter a gradient to the sharded axes of ``goal``, with sums in ``dtype``. If
    ``dtype`` is wider than the gradient's dtype, ranks exchange the summands unconverted
    (all-to-all), and the receiving rank adds up the summands in ``dtype``. The sum is the same. In
    bfloat16, the all-to-all sends half the bytes of a float32 reduce-scatter."""
    target = reduce_scattered(g.placements, goal)
    for axis, (now, then) in enumerate(zip(g.placements, target, strict=True)):
        if (
            now.is_partial()
            and now != then
            and g.dtype.itemsize < dtype.itemsize
            and _shards_evenly(g, axis, target)
        ):
            g = _all_to_all_then_sum(g, axis, dim_of(then), dtype)
    return g if target == g.placements else cast(g, dtype).redistribute(g.device_mesh, target)


def equal_parts(x: DTensor, placements: Sequence[Placement]) -> bool:
    """Whether x, sharded by these placements, has shards of one size on all ranks. Unequal shards
    are padded before they are sent."""
    size = list(x.shape)
    for axis, at in enumerate(placements):
        if at.is_shard():
            n = x.device_mesh.size(axis)  # torch 2.11 does not trace a mesh's shape
            if size[dim_of(at)] % n:
                return False
            size[dim_of(at)] //= n
    return True


def part_of(
    shape: Sequence[int], mesh: DeviceMesh | None, placements: Sequence[Placement]
) -> list[float]:
    """Return the shape of a rank's shard, with fractions where the mesh does not divide a dim. With
    fractions the shape is the same on every rank, and all ranks decide alike."""
    part: list[float] = list(shape)
    for axis, p in enumerate(placements):
        if isinstance(p, Shard) and mesh is not None:
            part[p.dim] /= mesh.size(axis)
    return part


def _shards_evenly(g: DTensor, axis: int, target: Sequence[Placement]) -> bool:
    """Whether this mesh axis can shard its dim next, into equal shards. It can if three things
    hold: no inner axis shards the dim already, no outer axis has yet to shard the dim, and the
    local size is divisible."""
    dim = dim_of(target[axis])
    inner = any(p.is_shard(dim) for p in g.placements[axis + 1 :])
    outer = any(
        a != b and b.is_shard(dim) for a, b in zip(g.placements[:axis], target[:axis], strict=True)
    )
    return not inner and not outer and g.to_local().shape[dim] % g.device_mesh.size(axis) == 0


def _all_to_all_then_sum(g: DTensor, axis: int, dim: int, dtype: torch.dtype) -> DTensor:
    mesh = g.device_mesh
    own, others = exchange_rows(
        g.to_local().unflatten(dim, (mesh.size(axis), -1)).movedim(dim, 0), mesh, axis
    )
    total = row_sum(own, others, dtype)
    placements = [Shard(dim) if i == axis else p for i, p in enumerate(g.placements)]
    return DTensor.from_local(
        total, mesh, placements, run_check=False, shape=g.shape, stride=g.stride()
    )


def row_sum(own: Tensor, others: Tensor, dtype: torch.dtype) -> Tensor:
    """Add up the results of ``exchange_rows`` in ``dtype``."""
    return own.to(dtype) + others.sum(0, dtype=dtype)


def output_gradient(placements: Sequence[Placement]) -> list[Placement]:
    """The placements of an output's gradient: the placements of the output, but Replicate where the
    output is Partial. Each summand has the gradient of the sum."""
    return [Replicate() if p.is_partial() else p for p in placements]


def to_local(x: Tensor) -> Tensor:
    """Return this rank's local tensor, which shares memory with x. Not for use under autograd. Use
    a local region there (``Layout.local_map``): it declares the placements of gradients."""
    if not isinstance(x, DTensor):
        return x
    with torch.no_grad():
        return x.to_local()


def like(x: Tensor, part: Tensor) -> Tensor:
    """Return a tensor with x's placements and the local tensor ``part``, on any device. DTensor's
    constructor is not public, but ``from_local`` would move ``part`` to the mesh's device."""
    return DTensor(part, x._spec, requires_grad=False) if isinstance(x, DTensor) else part


def pending_maximum(x: Tensor, y: Tensor) -> Tensor:
    """Return the larger elements; a maximum over ranks may be pending in both tensors."""
    return like(x, torch.maximum(to_local(x), to_local(y)))


@typing.overload
def cast(x: DTensor, dtype: torch.dtype, copy: bool = False) -> DTensor: ...
@typing.overload
def cast(x: Tensor, dtype: torch.dtype, copy: bool = False) -> Tensor: ...


def cast(x: Tensor, dtype: torch.dtype, copy: bool = False) -> Tensor:
    """Cast like ``x.to(dtype)``, but keep Partial placements: DTensor's ``to`` may reduce first."""
    if not isinstance(x, DTensor):
        return x.to(dtype, copy=copy)
    if x.dtype == dtype and not copy:
        return x
    part = x.to_local().to(dtype, copy=copy)
    return DTensor.from_local(
        part, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride()
    )


def shard(x: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """Shard a tensor that every rank holds whole. Communicates nothing. Copies x: otherwise
    simulated ranks would share its memory, and an in-place update would happen once per rank."""
    own = torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
    whole = DTensor.from_local(own, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(mesh, placements)


def shard_start(x: Tensor) -> tuple[int, ...]:
    """Return the index in the whole tensor of the first element of this rank's shard. The method of
    DTensor is meant for checkpoints of torch, and is not documented."""
    if not isinstance(x, DTensor):
        return (0,) * x.ndim
    (chunk,) = x.__create_chunk_list__()
    return tuple(chunk.offsets)


def shard_like(x: Tensor, y: Tensor) -> Tensor:
    """Shard x, which every rank holds whole, by the placements of y's gradient."""
    if not isinstance(y, DTensor):
        return x
    return shard(x, y.device_mesh, output_gradient(y.placements))


def full(x: Tensor) -> Tensor:
    """Unshard a tensor: return a plain tensor that is whole on every rank. Under simulated ranks
    and on one device the result is a plain tensor too."""
    if isinstance(x, DTensor):
        x = _unshard(x, [Replicate()] * x.device_mesh.ndim).to_local()
    return same_on_all(x)


def rank() -> int:
    """Return the rank of this process. In a simulation it is 0 (there ``dist.get_rank`` of torch
    2.14 is the rank of each simulated rank)."""
    world = dist.group.WORLD
    return 0 if world is None else world.rank()
