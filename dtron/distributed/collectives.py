"""Collectives inside local regions: on each rank's plain tensors, and differentiable.

Functional collectives are the only ones that autograd, torch.compile and simulated ranks all
understand. They are semi-private, so they are imported here alone. The gradient of each is written
out: that of an all-to-all is an all-to-all with the splits swapped, that of an all-gather a
reduce-scatter, and the reverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dtron.torch_compile import opaque

Splits = Sequence[int] | None

# torch 2.13 has given them other names.
_ALL_GATHER = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
_REDUCE_SCATTER = getattr(funcol, "reduce_scatter_single", None) or funcol.reduce_scatter_tensor


def all_reduce(x: Tensor, mesh: DeviceMesh, dims: Sequence[int], op: str = "sum") -> Tensor:
    """One after the other over some dims of a mesh. Not differentiable."""
    for dim in dims:
        x = funcol.wait_tensor(funcol.all_reduce(x, op, (mesh, dim)))
    return x


def exchange_rows(x: Tensor, mesh: DeviceMesh, dim: int) -> tuple[Tensor, Tensor]:
    """Row i of x goes to rank i of a dim of the mesh. The row that stays here, and those that came,
    in the order of their ranks. Not differentiable."""
    n, place = mesh.size(dim), mesh.get_coordinate()[dim]
    others = [i + (i + n - place) // n for i in range(n - 1)]  # arithmetic alone, as in _one_hot
    rows = [x.narrow(0, i, 1) for i in others]
    rows = torch.cat(rows) if n > 2 else rows[0].contiguous()
    splits = [1 - one for one in _one_hot(1, place, n)]
    return x.select(0, place), _swap(rows, (mesh, dim), splits, splits)


def gather_along(x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """``[1, ...]`` of each rank along a dim of the mesh -> ``[ranks, ...]``. Not differentiable."""
    return funcol.wait_tensor(_ALL_GATHER(x, 0, (mesh, dim)))


def all_to_all(
    x: Tensor, ranks: DeviceMesh, received: Splits = None, sent: Splits = None
) -> Tensor:
    """The ranks of a mesh of one dim each send ``sent[i]`` rows of x to rank i, and get
    ``received[i]`` from it; None: equal parts."""
    return _AllToAll.apply(x, _name(ranks), received, sent)


def all_gather(x: Tensor, ranks: DeviceMesh) -> Tensor:
    """The rows of all ranks, in order."""
    return _AllGather.apply(x, _name(ranks))


def reduce_scatter(x: Tensor, ranks: DeviceMesh) -> Tensor:
    """The sum of all ranks' rows, of which each gets its part."""
    return _ReduceScatter.apply(x, _name(ranks))


@opaque
class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: str, received: Splits, sent: Splits) -> Tensor:
        ctx.args = (group, sent, received)
        return _swap(x, group, received, sent)

    @staticmethod
    def backward(ctx, g: Tensor):
        return _swap(g.contiguous(), *ctx.args), None, None, None


@opaque
class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    def backward(ctx, g: Tensor):
        return _scatter(g.contiguous(), ctx.group), None


@opaque
class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _scatter(x, group)

    @staticmethod
    def backward(ctx, g: Tensor):
        return _gather(g.contiguous(), ctx.group), None


@dataclass(frozen=True)
class RingGroup:
    """Ranks, as a mesh of one dim, and the place of this one among them."""

    ranks: DeviceMesh
    place: int

    @property
    def args(self) -> tuple[str, int, int]:
        """What ``shift`` takes: the group's name, this rank's place, and how many they are."""
        return _name(self.ranks), self.place, self.ranks.size()


def shift(x: Tensor, group: str, place: int, n: int, by: int = 1) -> Tensor:
    """In a ring of n ranks (``RingGroup.args``): x goes to the rank that is ``by`` further on, and
    that of the one as far behind comes. It is on its way: ``wait`` for it, and let work that does
    not need it come first. Not differentiable. An all-to-all of which all other parts are empty; a
    send would be no functional collective."""
    to, of = (_one_hot(x.shape[0], place + d, n) for d in (by, n - by))
    return torch.ops._c10d_functional.all_to_all_single(x.contiguous(), of, to, group)


def wait(x: Tensor) -> Tensor:
    """For what ``shift`` gave."""
    return funcol.wait_tensor(x)


def _one_hot(size: int, at: int, n: int) -> list[int]:
    """``size`` at place ``at % n`` of n, 0 elsewhere: in arithmetic alone, since a simulated rank's
    number is one for each rank, and compares with nothing."""
    return [size * (1 - ((at + 2 * n - j) % n + n - 1) // n) for j in range(n)]


def _name(ranks: DeviceMesh) -> str:
    return ranks.get_group().group_name


def _swap(x: Tensor, group: str | tuple[DeviceMesh, int], received: Splits, sent: Splits) -> Tensor:
    return funcol.wait_tensor(funcol.all_to_all_single(x, received, sent, group))


def _gather(x: Tensor, group: str) -> Tensor:
    return funcol.wait_tensor(_ALL_GATHER(x, 0, group))


def _scatter(x: Tensor, group: str) -> Tensor:
    return funcol.wait_tensor(_REDUCE_SCATTER(x, "sum", 0, group))
