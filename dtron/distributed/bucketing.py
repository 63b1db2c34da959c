"""Bucketing: move all weights or gradients of a stage to their placements in few collectives.

A collective costs a latency plus the time for its bytes, and many weights of a model have few
bytes. So *small* tensors share collectives: they are concatenated, row by row. For a reduce-scatter
over n ranks, each gradient is split into its n shards, ``[n, size of a shard]``, and these matrices
are concatenated side by side. A row of the sum then has one rank's shard of every gradient. An
all-gather does the same in reverse. (DDP's buckets, Li et al. 2020, arXiv:2006.15704, section
3.2.3, hold gradients of any size and are hidden behind backward. Here nothing has to wait for a
bucket to fill, and large weights are sent without a copy to a bucket.)

Left out: tensors that are sharded over other axes too, tensors that cannot be split into equal
shards, and ZeRO-3's all-gathers in every block, which are overlapped one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from dtron.distributed.redistribute import (
    cast,
    dim_of,
    equal_parts,
    reduce_scatter,
    reduce_scattered,
    to_local,
)

SMALL = 2**20  # elements; smaller tensors share collectives

# For each gradient: the placements of its weight, and the dtype in which to sum it.
GradTargets = Sequence[tuple[Sequence[Placement], torch.dtype]]


def reduce_scatter_all(grads: Sequence[DTensor], goals: GradTargets) -> list[DTensor]:
    """Reduce-scatter gradients to the placements of their weights on the axes where the weights are
    sharded. Gradients stay Partial over other axes. A gradient that is not reduced keeps its
    dtype."""

    def shared(i: int) -> Any:
        g, (goal, dtype) = grads[i], goals[i]
        target = reduce_scattered(g.placements, goal)
        axes = tuple(a for a, (x, y) in enumerate(zip(g.placements, target, strict=True)) if x != y)
        sums = axes and all(g.placements[a].is_partial() for a in axes)
        small = g.numel() < SMALL and sums and not any(p.is_shard() for p in g.placements)
        return (
            (axes, tuple(g.placements), g.dtype, dtype)
            if small and equal_parts(g, target)
            else None
        )

    found: list[Any] = [None] * len(grads)
    for key, where in _grouped(len(grads), shared):
        if key is None or len(where) == 1:
            for i in where:
                found[i] = reduce_scatter(grads[i], *goals[i])
            continue
        targets = [reduce_scattered(grads[i].placements, goals[i][0]) for i in where]
        some = _reduce_scatter_bucket(
            [grads[i] for i in where], targets, key[0], goals[where[0]][1]
        )
        for i, g in zip(where, some, strict=True):
            found[i] = g
    return found


def unshard_bucketed(
    weights: Sequence[DTensor], goals: Sequence[Sequence[Placement]], dtype: torch.dtype | None
) -> dict[int, DTensor]:
    """All-gather the weights that can share an all-gather. Return these weights only, as ``{i:
    weight i with placements goals[i], in dtype}``. Not for use under autograd."""

    def shared(i: int) -> Any:
        w, goal = weights[i], tuple(goals[i])
        axes = tuple(a for a, (x, y) in enumerate(zip(w.placements, goal, strict=True)) if x != y)
        small = w.numel() < SMALL and axes and not any(p.is_shard() for p in goal)
        return (axes, w.dtype) if small and equal_parts(w, w.placements) else None

    found: dict[int, DTensor] = {}
    for key, where in _grouped(len(weights), shared):
        if key is not None and len(where) > 1:
            some = [cast(weights[i], dtype or weights[i].dtype) for i in where]
            some = _all_gather_bucket(some, [goals[i] for i in where], key[0])
            found |= dict(zip(where, some, strict=True))
    return found


def reduce_grads(grads: Sequence[DTensor], goals: GradTargets) -> list[DTensor]:
    """Reduce gradients to the placements of their weights. First come the reduce-scatters, which
    shrink the gradients, then the remaining sums. Small gradients (norms, biases) are concatenated
    for these sums too."""
    found = reduce_scatter_all(grads, goals)

    def shared(i: int) -> Any:
        g, (goal, dtype) = found[i], goals[i]
        if g.placements == tuple(goal):
            return "there"
        small = g.numel() < SMALL and not any(p.is_shard() for p in g.placements)
        return (tuple(g.placements), dtype) if small else None

    for key, where in _grouped(len(found), shared):
        if key is None:
            for i in where:
                goal, dtype = goals[i]
                found[i] = cast(found[i], dtype).redistribute(found[i].device_mesh, goal)
        elif key != "there":
            pending, dtype = key
            mesh, parts = found[where[0]].device_mesh, [found[i] for i in where]
            line = torch.cat([x.to_local().flatten().to(dtype) for x in parts])
            line = DTensor.from_local(line, mesh, pending, run_check=False).redistribute(
                mesh, [Replicate()] * mesh.ndim
            )
            for i, x in zip(where, line.to_local().split([x.numel() for x in parts]), strict=True):
                found[i] = DTensor.from_local(
                    x.view(found[i].shape), mesh, line.placements, run_check=False
                )
    return found


def _grouped(n: int, key: Callable[[int], Any]) -> list[tuple[Any, list[int]]]:
    groups: dict[Any, list[int]] = {}
    for i in range(n):
        groups.setdefault(key(i), []).append(i)
    return list(groups.items())


def _line(x: Tensor, mesh: DeviceMesh, axis: int, lies: Placement) -> DTensor:
    """Make a DTensor of a rank's rows, with placement ``lies`` on one axis. All other axes are
    declared Replicate, whatever their true placement, so that no collective runs over them."""
    placements = [lies if i == axis else Replicate() for i in range(mesh.ndim)]
    return DTensor.from_local(x, mesh, placements, run_check=False)


def _reduce_scatter_bucket(
    grads: Sequence[DTensor],
    targets: Sequence[Sequence[Placement]],
    axes: Sequence[int],
    dtype: torch.dtype,
) -> list[DTensor]:
    mesh, parts = grads[0].device_mesh, [to_local(g) for g in grads]
    for axis in axes:
        n = mesh.size(axis)
        dims = [dim_of(t[axis]) for t in targets]
        cut = [x.unflatten(d, (n, -1)).movedim(d, 0) for x, d in zip(parts, dims, strict=True)]
        line = _line(torch.cat([x.reshape(n, -1) for x in cut], 1), mesh, axis, Partial())
        line = reduce_scatter(
            line, [Shard(0) if i == axis else Replicate() for i in range(mesh.ndim)], dtype
        )
        rows = line.to_local()[0].split([x[0].numel() for x in cut])
        parts = [row.view(x.shape[1:]) for row, x in zip(rows, cut, strict=True)]
    return [
        DTensor.from_local(x, mesh, t, run_check=False, shape=g.shape, stride=g.stride())
        for x, t, g in zip(parts, targets, grads, strict=True)
    ]


def _all_gather_bucket(
    weights: Sequence[DTensor], goals: Sequence[Sequence[Placement]], axes: Sequence[int]
) -> list[DTensor]:
    mesh, parts = weights[0].device_mesh, [to_local(w) for w in weights]
    for axis in reversed(axes):
        dims = [dim_of(w.placements[axis]) for w in weights]
        line = _line(torch.cat([x.reshape(-1) for x in parts])[None], mesh, axis, Shard(0))
        rows = line.redistribute(mesh, [Replicate()] * mesh.ndim).to_local()
        pieces = rows.split([x.numel() for x in parts], 1)
        parts = [
            piece.unflatten(1, x.shape).movedim(0, d).flatten(d, d + 1)
            for piece, x, d in zip(pieces, parts, dims, strict=True)
        ]
    return [
        DTensor.from_local(
            x.contiguous(), mesh, goal, run_check=False, shape=w.shape, stride=w.stride()
        )
        for x, goal, w in zip(parts, goals, weights, strict=True)
    ]
