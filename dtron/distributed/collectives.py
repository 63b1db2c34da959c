"""Collectives for local regions: on each rank's plain tensors, and differentiable.

Functional collectives are the only ones that work with autograd, torch.compile and simulated ranks.
Functional collectives are semi-private in torch, so only this file imports them. Each backward is
written out here.
The backward of an all-to-all is an all-to-all with the splits swapped. The backward of an
all-gather is a reduce-scatter, and the reverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

Splits = Sequence[int] | None

# torch 2.13 renamed the first two functions, and gave group names a type of their own.
_ALL_GATHER: Any = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
_REDUCE_SCATTER: Any = (
    getattr(funcol, "reduce_scatter_single", None) or funcol.reduce_scatter_tensor
)
_ALL_TO_ALL: Any = funcol.all_to_all_single


def all_reduce(x: Tensor, mesh: DeviceMesh, dims: Sequence[int], op: str = "sum") -> Tensor:
    """All-reduce x over these dims of the mesh, one dim after another. Not differentiable."""
    for dim in dims:
        x = funcol.wait_tensor(funcol.all_reduce(x, op, (mesh, dim)))
    return x


def exchange_rows(x: Tensor, mesh: DeviceMesh, dim: int) -> tuple[Tensor, Tensor]:
    """Send row i of x to rank i along a dim of the mesh. Return two tensors: this rank's own row,
    and the received rows in the order of their ranks. Not differentiable."""
    own, others = start_exchange(x, mesh, dim)
    return own, wait(others)


def start_exchange(x: Tensor, mesh: DeviceMesh, dim: int) -> tuple[Tensor, Tensor]:
    """Start ``exchange_rows``. Call ``wait`` on the second result before its use."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None  # this process is one of the mesh's ranks
    n, index = mesh.size(dim), coordinate[dim]
    others = [i + (i + n - index) // n for i in range(n - 1)]  # arithmetic alone, as in _one_hot
    rows = [x.narrow(0, i, 1) for i in others]
    rows = torch.cat(rows) if n > 2 else rows[0].contiguous()
    splits = [1 - own for own in _one_hot(1, index, n)]
    group = mesh.get_group(dim).group_name
    others = torch.ops._c10d_functional.all_to_all_single(rows, splits, splits, group)
    return x.select(0, index), others


def start_all_gathers(xs: Sequence[Tensor], mesh: DeviceMesh, dim: int) -> list[Tensor]:
    """Start the all-gathers of several tensors of one dtype along a dim of the mesh, as one
    collective. Call ``wait`` on each result before its use: the rows of all ranks, concatenated.
    Not differentiable. (With several dtypes gloo returns wrong values, and no error.)"""
    n, group = mesh.size(dim), mesh.get_group(dim).group_name
    return list(torch.ops._c10d_functional.all_gather_into_tensor_coalesced([*xs], n, group))


def start_reduce_scatter(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """Start a reduce-scatter along a dim of the mesh: the sum of x over all ranks, of which each
    rank receives its shard of the rows. Call ``wait`` on the result before its use. Not
    differentiable."""
    group = mesh.get_group(dim).group_name
    return torch.ops._c10d_functional.reduce_scatter_tensor(x, "sum", mesh.size(dim), group)


def gather_along(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """All-gather along a dim of the mesh: ``[1, ...]`` of each rank -> ``[ranks, ...]``. Not
    differentiable."""
    return funcol.wait_tensor(_ALL_GATHER(x, 0, (mesh, dim)))


def all_to_all(
    x: Tensor, ranks: DeviceMesh, received: Splits = None, sent: Splits = None
) -> Tensor:
    """All-to-all over a one-dim mesh: each rank sends ``sent[i]`` rows of x to rank i and receives
    ``received[i]`` rows from rank i. None: equal splits."""
    return _AllToAll.apply(x, _group_name(ranks), received, sent)


def all_gather(x: Tensor, ranks: DeviceMesh) -> Tensor:
    """Concatenate the rows of all ranks, in the order of the ranks."""
    return _AllGather.apply(x, _group_name(ranks))


def reduce_scatter(x: Tensor, ranks: DeviceMesh) -> Tensor:
    """Sum x over all ranks; each rank receives its shard of the rows."""
    return _ReduceScatter.apply(x, _group_name(ranks))


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, received: Splits, sent: Splits) -> Tensor:
        ctx.args = (group, sent, received)
        return _all_to_all(x, group, received, sent)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(g.contiguous(), *ctx.args), None, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return _reduce_scatter(g.contiguous(), ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return _all_gather(g.contiguous(), ctx.group), None


@dataclass(frozen=True)
class AxisGroup:
    """The ranks along an axis, as a one-dim mesh, and the place of this rank among them."""

    ranks: DeviceMesh
    place: int

    @property
    def args(self) -> tuple[str, int, int]:
        """The arguments of ``shift``: the group's name, this rank's place, the number of ranks."""
        return _group_name(self.ranks), self.place, self.ranks.size()


def shift(x: Tensor, group: str, place: int, n: int, by: int = 1) -> Tensor:
    """Send x to the rank ``by`` places ahead in a ring of n ranks, and receive the x of the rank
    ``by`` places behind. The transfer is asynchronous: first do the work that does not need the
    result, then call ``wait`` on the result. Not differentiable.

    ``group``, ``place``, ``n``: ``AxisGroup.args``.

    The transfer is an all-to-all in which all other splits are empty, because a send is not a
    functional collective."""
    sent, received = (_one_hot(x.shape[0], place + d, n) for d in (by, n - by))
    return torch.ops._c10d_functional.all_to_all_single(x.contiguous(), received, sent, group)


def wait(x: Tensor) -> Tensor:
    """Wait for the result of ``shift`` or of a ``start_`` function, and return the result."""
    return funcol.wait_tensor(x)


def ring_shift(x: Tensor, ranks: AxisGroup) -> Tensor:
    """Send x to the next rank, and return the x of the previous rank. The first rank receives from
    the last one. Differentiable: the gradient goes to the previous rank."""
    return _RingShift.apply(x, *ranks.args)


class _RingShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, place: int, n: int) -> Tensor:
        ctx.ring = (group, place, n)
        return wait(shift(x, group, place, n))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        group, place, n = ctx.ring
        return wait(shift(g, group, place, n, by=-1)), None, None, None


def _one_hot(size: int, at: int, n: int) -> list[int]:
    """Return n numbers: ``size`` at index ``at % n``, 0 elsewhere. Only arithmetic is used: under
    simulation ``at`` has one value for each rank, so comparisons are not possible."""
    return [size * (1 - ((at + 2 * n - j) % n + n - 1) // n) for j in range(n)]


def _group_name(ranks: DeviceMesh) -> str:
    return ranks.get_group().group_name


def _all_to_all(x: Tensor, group: str, received: Splits, sent: Splits) -> Tensor:
    return funcol.wait_tensor(_ALL_TO_ALL(x, received, sent, group))


def _all_gather(x: Tensor, group: str) -> Tensor:
    return funcol.wait_tensor(_ALL_GATHER(x, 0, group))


def _reduce_scatter(x: Tensor, group: str) -> Tensor:
    return funcol.wait_tensor(_REDUCE_SCATTER(x, "sum", 0, group))
