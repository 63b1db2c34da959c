"""Memory that GPUs of one host reach of each other, and the process groups that use it
(distributed/copy_engine.py).

``backends`` chooses the groups when a mesh is built, ``to_symmetric_memory`` moves what they gather
to where it can be pulled from, and ``publish_weights``, after weights have been written, tells all
ranks. Nothing else in dtron knows of them.

*Symmetric memory*, and how a group of one's own is made known to torch, are private there and this
file's alone (https://docs.pytorch.org/docs/stable/symmetric_memory.html)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dtron.distributed.copy_engine import CopyEngineGroup, SymmetricBuffer, room_for
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import equal_parts, like, local
from dtron.errors import UserError


def allocate(size: int) -> Tensor:
    """Bytes that other GPUs of this host can map."""
    import torch.distributed._symmetric_memory as symmetric  # takes a second, and a CPU has none

    return symmetric.empty(size, dtype=torch.uint8, device="cuda")


def _made(group: Any, options: Any) -> CopyEngineGroup:
    """What torch calls for a group of backend "copies"."""
    from torch._C._distributed_c10d import _register_process_group

    rank, size, timeout = group.group_rank, group.group_size, group.timeout
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    nccl = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", group.store), rank, size, options)
    nccl._set_sequence_number_for_group()
    # Ranks meet by an ordinary group of the same ranks: torch asks it for its store, and a group
    # written in Python has none.
    name = f"{group.group_id}.copies"
    place = dist.ProcessGroup(dist.PrefixStore("copies", group.store), rank, size)
    _register_process_group(name, place)  # which does not keep it alive
    meet = lambda memory, place=place: _met(memory, name)
    return CopyEngineGroup(nccl, rank, size, "cuda", allocate, meet, timeout)


def _met(memory: Tensor, group: str) -> SymmetricBuffer:
    import torch.distributed._symmetric_memory as symmetric

    try:
        return symmetric.rendezvous(memory, group)
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        raise UserError(
            f"GPUs of this host cannot share memory ({why}); use --copy-engines off"
        ) from error


def backends(shape: MeshShape, device: str, axes: Sequence[str]) -> dict[str, str] | None:
    """For ``init_device_mesh``: the dims of the mesh whose groups are to be CopyEngineGroups: of ``axes``,
    over which ZeRO shards, all whose groups are of one host, where GPUs reach each other's memory.
    None: no dim."""
    atoms, here = shape.atoms, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device != "cuda" or not atoms or not _peers(here):
        return None
    if not hasattr(dist.Backend, "COPIES"):
        dist.Backend.register_backend("copies", _made, extended_api=True, devices=["cuda"])
    spans, span = {}, 1
    for atom, n in reversed(atoms.items()):
        span *= n
        spans[atom] = span  # a group's first and last rank are less than this apart
    return {atom: "copies" for atom in axes if here % spans[atom] == 0} or None


def _peers(count: int) -> bool:
    mine = torch.cuda.current_device()
    return all(torch.cuda.can_device_access_peer(mine, i) for i in range(count) if i != mine)


def copy_engine_groups(mesh: DeviceMesh | None) -> list[str]:
    """The names of the groups in which copy engines carry the gathers of weights."""
    return [group.group_name for group in _groups(mesh).values()]


def sole_copy_engine_group(mesh: DeviceMesh | None, axes: Sequence[str]) -> str | None:
    """The name of the group of copy engines, where weights are gathered over that one alone.
    ``axes``: the dims of the mesh over which they are gathered."""
    groups = copy_engine_groups(mesh)
    return groups[0] if groups and len(axes) == 1 else None


def _mesh(tensors: list[Any]) -> DeviceMesh | None:
    return next((x.device_mesh for x in tensors if isinstance(x, DTensor)), None)


def _groups(mesh: DeviceMesh | None) -> dict[int, CopyEngineGroup]:
    """The groups of a mesh that are CopyEngineGroups, by its dim."""
    groups = {} if mesh is None else {i: mesh.get_group(i) for i in range(mesh.ndim)}
    return {i: group for i, group in groups.items() if isinstance(group, CopyEngineGroup)}


def to_symmetric_memory(tensors: list[Any]) -> list[Any]:
    """The same DTensors; what a group would gather has its parts moved to symmetric memory, where
    they lie at the same place in each rank's."""
    groups, tensors = _groups(_mesh(tensors)), list(tensors)
    gathered = lambda x: (
        any(x.placements[i].is_shard() for i in groups) and equal_parts(x, x.placements)
    )
    away = [j for j, x in enumerate(tensors) if gathered(x)]
    if not away:
        return tensors
    parts = [local(tensors[j]) for j in away]
    sizes = [room_for(x) for x in parts]
    memory = next(iter(groups.values()))._allocate(sum(sizes))
    for j, part, room in zip(away, parts, memory.split(sizes), strict=True):
        there = room[: part.nbytes].view(part.dtype).view(part.shape)
        tensors[j] = like(tensors[j], there.copy_(part))
    for group in groups.values():
        group.meet(memory)
    return tensors


def publish_weights(tensors: list[Any]) -> None:
    """Says to all ranks that these weights have been written."""
    for group in _groups(_mesh(tensors)).values():
        group.settle()
