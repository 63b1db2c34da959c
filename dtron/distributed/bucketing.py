"""Bucketing: move all weights or gradients of a stage to their placements in few collectives.

A collective costs a latency plus the time for its bytes, and many weights of a model have few
bytes. So *small* tensors share collectives: they are concatenated in a bucket. For a reduce-scatter
over n ranks, each gradient is split into its n shards, ``[n, size of a shard]``, and these matrices
are concatenated along the second dim. A row of the sum then has one rank's shard of every gradient.
An all-gather does the same in reverse. (DDP's buckets, Li et al. 2020, arXiv:2006.15704, section
3.2.3, hold gradients of any size and are hidden behind backward. Here nothing has to wait for a
bucket to fill, and large weights are sent without a copy to a bucket.)

Left out: reduce-scatters and all-gathers of tensors that are sharded over other axes too, tensors
that cannot be split into equal shards, and ZeRO-3's all-gathers in every block, which are
overlapped one by one."""

from __future__ import annotations

import math
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

    def bucket_key(i: int) -> Any:
        g, (goal, dtype) = grads[i], goals[i]
        target = reduce_scattered(g.placements, goal)
        axes = _changed(g.placements, target)
        sums = axes and all(g.placements[a].is_partial() for a in axes)
        small = g.numel() < SMALL and sums and not any(p.is_shard() for p in g.placements)
        return (
            (axes, tuple(g.placements), g.dtype, dtype)
            if small and equal_parts(g, target)
            else None
        )

    reduced: list[Any] = [None] * len(grads)
    for key, members in _by_key(len(grads), bucket_key):
        if key is None or len(members) == 1:
            for i in members:
                reduced[i] = reduce_scatter(grads[i], *goals[i])
            continue
        targets = [reduce_scattered(grads[i].placements, goals[i][0]) for i in members]
        shards = _reduce_scatter_bucket(
            [grads[i] for i in members], targets, key[0], goals[members[0]][1]
        )
        for i, g in zip(members, shards, strict=True):
            reduced[i] = g
    return reduced


def unshard_bucketed(
    weights: Sequence[DTensor], goals: Sequence[Sequence[Placement]], dtype: torch.dtype | None
) -> dict[int, DTensor]:
    """All-gather the weights that can share an all-gather. Return these weights only, as ``{i:
    weight i with placements goals[i], in dtype}``. Not for use under autograd."""

    def bucket_key(i: int) -> Any:
        w, goal = weights[i], tuple(goals[i])
        axes = _changed(w.placements, goal)
        small = w.numel() < SMALL and axes and not any(p.is_shard() for p in goal)
        small = small and w.itemsize > 1  # codes are not cast to the dtype of a bucket
        return (axes, w.dtype) if small and equal_parts(w, w.placements) else None

    gathered: dict[int, DTensor] = {}
    for key, members in _by_key(len(weights), bucket_key):
        if key is not None and len(members) > 1:
            shards = [cast(weights[i], dtype or weights[i].dtype) for i in members]
            wholes = _all_gather_bucket(shards, [goals[i] for i in members], key[0])
            gathered |= dict(zip(members, wholes, strict=True))
    return gathered


def reduce_grads(grads: Sequence[DTensor], goals: GradTargets) -> list[DTensor]:
    """Reduce gradients to the placements of their weights. First come the reduce-scatters, which
    shrink the gradients, then the remaining sums. Small gradients (norms, biases, low-rank updates)
    are concatenated for these sums too."""
    reduced = reduce_scatter_all(grads, goals)

    def bucket_key(i: int) -> Any:
        g, (goal, dtype) = reduced[i], goals[i]
        if g.placements == tuple(goal):
            return "complete"
        sums = all(p.is_partial() for p, q in zip(g.placements, goal, strict=True) if p != q)
        pending = tuple(p if p.is_partial() else Replicate() for p in g.placements)
        small = sums and g.numel() < SMALL and equal_parts(g, g.placements)
        return (pending, dtype) if small else None

    for key, members in _by_key(len(reduced), bucket_key):
        if key is None:
            for i in members:
                goal, dtype = goals[i]
                reduced[i] = cast(reduced[i], dtype).redistribute(reduced[i].device_mesh, goal)
        elif key != "complete":
            pending, dtype = key
            mesh, parts = reduced[members[0]].device_mesh, [to_local(reduced[i]) for i in members]
            bucket = torch.cat([x.flatten().to(dtype) for x in parts])
            bucket = DTensor.from_local(bucket, mesh, pending, run_check=False).redistribute(
                mesh, [Replicate()] * mesh.ndim
            )
            sums = bucket.to_local().split([x.numel() for x in parts])
            for i, x, part in zip(members, sums, parts, strict=True):
                reduced[i] = _like(x.view(part.shape), reduced[i], goals[i][0])
    return reduced


def _like(x: Tensor, g: DTensor, placements: Sequence[Placement]) -> DTensor:
    """Make a DTensor of the shape of ``g`` from a local tensor, which is contiguous."""
    strides = [math.prod(g.shape[i + 1 :]) for i in range(g.ndim)]
    return DTensor.from_local(
        x, g.device_mesh, placements, run_check=False, shape=g.shape, stride=tuple(strides)
    )


def _changed(now: Sequence[Placement], goal: Sequence[Placement]) -> tuple[int, ...]:
    """Return the mesh axes on which two placements differ."""
    return tuple(axis for axis, (x, y) in enumerate(zip(now, goal, strict=True)) if x != y)


def _by_key(n: int, key: Callable[[int], Any]) -> list[tuple[Any, list[int]]]:
    """Group the numbers below ``n`` by their key."""
    groups: dict[Any, list[int]] = {}
    for i in range(n):
        groups.setdefault(key(i), []).append(i)
    return list(groups.items())


def _bucket(rows: Tensor, mesh: DeviceMesh, axis: int, placement: Placement) -> DTensor:
    """Make a DTensor of a rank's rows, with this placement on one axis. All other axes are declared
    Replicate, whatever their true placement, so that no collective runs over them."""
    placements = [placement if i == axis else Replicate() for i in range(mesh.ndim)]
    return DTensor.from_local(rows, mesh, placements, run_check=False)


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
        shards = [x.unflatten(d, (n, -1)).movedim(d, 0) for x, d in zip(parts, dims, strict=True)]
        bucket = _bucket(torch.cat([x.reshape(n, -1) for x in shards], 1), mesh, axis, Partial())
        bucket = reduce_scatter(
            bucket, [Shard(0) if i == axis else Replicate() for i in range(mesh.ndim)], dtype
        )
        rows = bucket.to_local()[0].split([x[0].numel() for x in shards])
        parts = [row.view(x.shape[1:]) for row, x in zip(rows, shards, strict=True)]
    return [_like(x, g, t) for x, g, t in zip(parts, grads, targets, strict=True)]


def _all_gather_bucket(
    weights: Sequence[DTensor], goals: Sequence[Sequence[Placement]], axes: Sequence[int]
) -> list[DTensor]:
    mesh, parts = weights[0].device_mesh, [to_local(w) for w in weights]
    for axis in reversed(axes):
        dims = [dim_of(w.placements[axis]) for w in weights]
        bucket = _bucket(torch.cat([x.reshape(-1) for x in parts])[None], mesh, axis, Shard(0))
        rows = bucket.redistribute(mesh, [Replicate()] * mesh.ndim).to_local()
        shards = rows.split([x.numel() for x in parts], 1)
        parts = [
            shard.unflatten(1, x.shape).movedim(0, d).flatten(d, d + 1)
            for shard, x, d in zip(shards, parts, dims, strict=True)
        ]
    return [
        _like(x.contiguous(), w, goal) for x, w, goal in zip(parts, weights, goals, strict=True)
    ]
