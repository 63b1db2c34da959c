"""Whole matrices on some rank each: the exchange of an optimizer that needs whole matrices.

Muon needs each matrix of momentum whole, but ranks hold shards. If every rank gathered every
matrix, all ranks would do the same work. So each matrix has an *owner*. The owner receives the
shards of all ranks, computes, and sends each rank the shard of the result.

The exchange is a change of placements. Matrices of one shape are stacked into one tensor, which has
a leading dim for each mesh axis and a dim of slots:

    [ranks of axis 1, ranks of axis 2, ..., slots, *matrix]

Before the exchange a mesh axis shards a dim of the matrix, or no dim. After it, each mesh axis
shards its own leading dim: a rank has ``slots`` whole matrices. For an axis that sharded the matrix
the change is an all-to-all. For an axis that replicated it, it is no communication, and an
all-gather on the way back. There is one exchange for each shape of matrices, and not one for each
matrix.

An axis that shards experts is left alone: its ranks have different experts, and each deals its own
experts to the ranks of the other axes.

Left out: more than one rank for one matrix. If a stage has fewer matrices of all shapes than ranks,
some ranks own none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

Slots = tuple[tuple[int | None, ...], ...]
"""the matrices of each owner, in rows of equal length; None is an empty slot"""

EXPERTS = Shard(-1)
"""the placement, in ``Exchange``, of a mesh axis that shards experts"""


@dataclass(frozen=True)
class Job:
    """The matrices of one kind.

    ``count``: their number.
    ``cost``: the work of one matrix.
    ``owners``: the number of ranks to which they are dealt."""

    count: int
    cost: int
    owners: int


def deal(jobs: Mapping[Any, Job]) -> dict[Any, Slots]:
    """Deal matrices to ranks, expensive kinds first, each matrix to the rank with the least work.
    A rank gets at most one matrix of a kind more than another."""
    work: dict[int, list[int]] = {}
    dealt = {}
    for kind, job in sorted(jobs.items(), key=lambda item: -item[1].cost):
        slots = -(-job.count // job.owners)
        rows: list[list[int | None]] = [[] for _ in range(job.owners)]
        load = work.setdefault(job.owners, [0] * job.owners)
        for i in range(job.count):
            fewest = min(map(len, rows))
            owner = min(
                (r for r in range(job.owners) if len(rows[r]) == fewest), key=load.__getitem__
            )
            rows[owner].append(i)
            load[owner] += job.cost
        dealt[kind] = tuple(tuple(row + [None] * (slots - len(row))) for row in rows)
    return dealt


@dataclass(frozen=True)
class Exchange:
    """The exchange of matrices of one shape and one placement.

    ``mesh``: None on one device.
    ``placements``: the placements of a matrix, or ``EXPERTS``.
    ``shape``: the shape of a whole matrix."""

    mesh: DeviceMesh | None
    placements: tuple[Placement, ...]
    shape: tuple[int, ...]

    @property
    def owners(self) -> int:
        """The number of ranks to which each rank's matrices are dealt."""
        return math.prod(self._sizes)

    @property
    def _sizes(self) -> list[int]:
        """The leading dims of a rank's stack."""
        if self.mesh is None:
            return []
        return [1 if p == EXPERTS else self.mesh.size(i) for i, p in enumerate(self.placements)]

    def to_owners(self, shards: Sequence[Tensor], slots: Slots) -> Tensor:
        """Return the whole matrices of this rank, ``[slots, *shape]``; an empty slot has zeros.

        ``shards``: this rank's shard of each matrix.
        ``slots``: the matrices of each owner."""
        empty = torch.zeros_like(shards[0])
        stack = torch.stack([empty if i is None else shards[i] for row in slots for i in row])
        if self.mesh is None:
            return stack
        x = self._dtensor(stack.unflatten(0, [*self._sizes, len(slots[0])]), self._before)
        for axis in reversed(range(self.mesh.ndim)):  # the inner of two axes that shard one dim
            x = self._moved(x, axis, self._after)
        return x.to_local().flatten(0, len(self._sizes))

    def to_shards(self, whole: Tensor, slots: Slots) -> list[Tensor]:
        """The reverse of ``to_owners``: return this rank's shard of each matrix."""
        stack = whole
        if self.mesh is not None:
            ones = [1] * len(self._sizes)
            x = self._dtensor(whole.unflatten(0, [*ones, len(slots[0])]), self._after)
            for axis in range(self.mesh.ndim):
                x = self._moved(x, axis, self._before)
            stack = x.to_local().flatten(0, len(self._sizes))
        order = [i for row in slots for i in row]
        found = {i: x for i, x in zip(order, stack.unbind(), strict=True) if i is not None}
        return [found[i] for i in range(len(found))]

    @property
    def _before(self) -> list[Placement]:
        first = len(self.placements) + 1  # of the matrix's dims
        return [
            Shard(axis)
            if p == EXPERTS
            else Shard(first + cast(Shard, p).dim)
            if p.is_shard()
            else Replicate()
            for axis, p in enumerate(self.placements)
        ]

    @property
    def _after(self) -> list[Placement]:
        return [Shard(axis) for axis in range(len(self.placements))]

    def _dtensor(self, stack: Tensor, placements: Sequence[Placement]) -> DTensor:
        mesh = self.mesh
        assert mesh is not None
        leading = [mesh.size(axis) for axis in range(mesh.ndim)]
        shape = torch.Size([*leading, stack.shape[mesh.ndim], *self.shape])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            stack, mesh, placements, run_check=False, shape=shape, stride=stride
        )

    def _moved(self, x: DTensor, axis: int, goal: Sequence[Placement]) -> DTensor:
        placements = [*x.placements]
        placements[axis] = goal[axis]
        return x if placements == [*x.placements] else x.redistribute(x.device_mesh, placements)
