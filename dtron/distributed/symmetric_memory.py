"""Symmetric memory: memory that all GPUs of one host can access, the process groups that use it
(distributed/copy_engine.py), and the slots for messages of a pipeline (schedules/message_slots.py).

``shared`` makes such memory. ``backends`` chooses the process groups when a mesh is built.
``to_symmetric_memory`` moves the tensors that these groups all-gather to symmetric memory.
``publish_weights`` announces to all ranks that weights have been written. ``copy_engine_groups``
returns the names of the groups. Nothing else in dtron knows of these groups.

In torch, *symmetric memory* and the registration of a custom process group are private API. Only
this file uses them (https://docs.pytorch.org/docs/stable/symmetric_memory.html)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dtron.distributed.copy_engine import CopyEngineGroup, SymmetricBuffer, aligned_bytes
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import equal_parts, like, to_local
from dtron.errors import UserError


def allocate(size: int) -> Tensor:
    """Allocate ``size`` bytes that other GPUs of this host can map."""
    # Imported here, because the import takes a second, and a CPU has no symmetric memory.
    import torch.distributed._symmetric_memory as symmetric

    return symmetric.empty(size, dtype=torch.uint8, device=torch.device("cuda"))


def _create_group(group: Any, options: Any) -> CopyEngineGroup:
    """Create a process group of backend "copies". torch calls this function."""
    from torch._C._distributed_c10d import _register_process_group

    rank, size, timeout = group.group_rank, group.group_size, group.timeout
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    nccl = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", group.store), rank, size, options)
    nccl._set_sequence_number_for_group()
    # The rendezvous needs an ordinary process group of the same ranks: torch asks the group for its
    # store, and a group written in Python has no store.
    name = f"{group.group_id}.copies"
    plain = dist.ProcessGroup(dist.PrefixStore("copies", group.store), rank, size)
    _register_process_group(name, plain)  # type: ignore[arg-type]  # a str in torch 2.11

    def rendezvous(memory: Tensor, keeps: dist.ProcessGroup = plain) -> SymmetricBuffer:
        # The registry has no reference to the plain group. ``keeps`` has one.
        return _rendezvous(memory, name)

    return CopyEngineGroup(nccl, rank, size, "cuda", allocate, rendezvous, timeout)


def _rendezvous(memory: Tensor, group: str) -> SymmetricBuffer:
    import torch.distributed._symmetric_memory as symmetric

    try:
        buffer: Any = symmetric.rendezvous(memory, group)  # type: ignore[arg-type]  # a str in 2.11
        return buffer
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        raise UserError(
            f"GPUs of this host cannot share memory ({why}); use --copy-engines off"
        ) from error


def backends(shape: MeshShape, device: str, axes: Sequence[str]) -> dict[str, str] | None:
    """Return the backends for ``init_device_mesh``: "copies" for each mesh dim whose groups are to
    be CopyEngineGroups, or None if there is no such dim. A dim of ``axes`` is chosen if each of its
    groups is within one host, and the GPUs of this host can access each other's memory.

    ``axes``: the mesh dims that ZeRO shards over.
    """
    atoms, host_ranks = shape.atoms, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device != "cuda" or not atoms or not _gpus_access_each_other(host_ranks):
        return None
    if not hasattr(dist.Backend, "COPIES"):
        dist.Backend.register_backend("copies", _create_group, extended_api=True, devices=["cuda"])
    spans, span = {}, 1
    for atom, n in reversed(atoms.items()):
        span *= n
        spans[atom] = span  # the first and last rank of a group are less than this apart
    return {atom: "copies" for atom in axes if host_ranks % spans[atom] == 0} or None


def on_one_host(ranks: Sequence[int]) -> bool:
    """Whether these processes compute on GPUs of one host that can access each other's memory."""
    host_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return len({r // host_ranks for r in ranks}) == 1 and _gpus_access_each_other(host_ranks)


def shared(size: int, group: dist.ProcessGroup) -> tuple[Tensor, Any]:
    """Allocate ``size`` bytes on each rank of a group. Return this rank's memory and the handle for
    the memory of all ranks. All ranks must call this."""
    memory = allocate(size)
    return memory, _rendezvous(memory, group.group_name)


def _gpus_access_each_other(count: int) -> bool:
    own = torch.cuda.current_device()
    return all(torch.cuda.can_device_access_peer(own, i) for i in range(count) if i != own)


def copy_engine_groups(mesh: DeviceMesh | None) -> list[str]:
    """Return the names of the groups whose weight all-gathers are carried by copy engines."""
    return [group.group_name for group in _groups(mesh).values()]


def _mesh(tensors: list[Any]) -> DeviceMesh | None:
    return next((x.device_mesh for x in tensors if isinstance(x, DTensor)), None)


def _groups(mesh: DeviceMesh | None) -> dict[int, CopyEngineGroup]:
    """Return the CopyEngineGroups of a mesh, by mesh dim."""
    groups = {} if mesh is None else {i: mesh.get_group(i) for i in range(mesh.ndim)}
    return {i: group for i, group in groups.items() if isinstance(group, CopyEngineGroup)}


def to_symmetric_memory(tensors: list[Any]) -> list[Any]:
    """Return the same DTensors. The shards of DTensors that a CopyEngineGroup would all-gather are
    moved to symmetric memory. There a shard has the same offset on every rank."""
    groups, tensors = _groups(_mesh(tensors)), list(tensors)

    def is_gathered(x: Any) -> bool:
        sharded = any(x.placements[i].is_shard() for i in groups)
        return sharded and equal_parts(x, x.placements)

    moved = [i for i, x in enumerate(tensors) if is_gathered(x)]
    if not moved:
        return tensors
    shards = [to_local(tensors[i]) for i in moved]
    sizes = [aligned_bytes(x) for x in shards]
    memory = next(iter(groups.values())).allocate(sum(sizes))
    for i, shard, part in zip(moved, shards, memory.split(sizes), strict=True):
        copy = part[: shard.nbytes].view(shard.dtype).view(shard.shape).copy_(shard)
        tensors[i] = like(tensors[i], copy)
    for group in groups.values():
        group.register(memory)
    return tensors


def publish_weights(tensors: list[Any]) -> None:
    """Announce to all ranks that these weights have been written. This is a barrier of each
    CopyEngineGroup."""
    for group in _groups(_mesh(tensors)).values():
        group.publish()
