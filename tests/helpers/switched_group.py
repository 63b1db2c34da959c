"""A copy engine group on gloo ranks, with mutants."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import dtron.distributed.copy_engine
from dtron.distributed.copy_engine import CopyEngineGroup


class Snapshots:
    """Memory of a copy engine group: ranks see its content at the last barrier.

    ``raced``: a rank has read bytes since the last barrier that were written before the next one.
    On a GPU the write could have come too late."""

    def __init__(self, memory: torch.Tensor):
        self.memory, self.seen, self.read, self.raced = (
            memory,
            [torch.zeros_like(memory)] * dist.get_world_size(),
            [],
            False,
        )

    def barrier(self, channel: int = 0, timeout_ms: int = 0) -> None:
        before, self.seen = self.seen, [torch.empty_like(self.memory) for _ in self.seen]
        dist.all_gather(self.seen, self.memory)
        self.raced |= not all(torch.equal(before[r][at], self.seen[r][at]) for r, at in self.read)
        self.read = []

    def get_buffer(self, rank, sizes, dtype, storage_offset):
        at = slice(
            storage_offset * dtype.itemsize, (storage_offset + math.prod(sizes)) * dtype.itemsize
        )
        self.read.append((rank, at))
        return self.seen[rank][at].view(dtype).view(sizes)


MUTANTS = ("unstaged", "unsettled", "other's", "one half", "one place")


class Switched(CopyEngineGroup):
    """A group whose mode is one of these. It counts copies.

    "copies": copy engines. "rest": every collective by gloo.
    The other modes are mutants. "unstaged": nothing is written to the staging buffer. "unsettled":
    updated weights are not published. "other's": the wrong shard is sent. "one half": the staging
    buffer has one half only. "one place": tensors that are sent together overlap."""

    mode, copied = "copies", 0

    def _fits_staging(self, x):
        return self.mode != "rest" and super()._fits_staging(x)

    def _registered_offset(self, x):
        return None if self.mode == "rest" else super()._registered_offset(x)

    def _work(self, *args):
        self.copied += 1
        return super()._work(*args)

    def _put_in_staging(self, parts):
        if self.mode == "one half":
            self._stagings = 2 * (self._stagings > 0)
        if self.mode == "unstaged":
            parts = [(at, x[:0]) for at, x in parts]
        return super()._put_in_staging(parts)

    def publish(self):
        if self.mode != "unsettled":
            super().publish()

    def _exchange_rows(self, pairs):
        roll = lambda x: x.roll(1, 0)
        super()._exchange_rows(
            [(out, roll(x)) for out, x in pairs] if self.mode == "other's" else pairs
        )

    @property
    def raced(self) -> bool:
        return self._staging is not None and self._staging[1].raced


def made(group, options) -> Switched:
    store = dist.PrefixStore("gloo", group.store)
    gloo = dist.ProcessGroupGloo(store, group.group_rank, group.group_size, group.timeout)
    allocate = lambda size: torch.zeros(size, dtype=torch.uint8)
    place = group.group_rank, group.group_size
    return Switched(gloo, *place, "cpu", allocate, Snapshots, timedelta(seconds=60))


@cache
def mesh_of_copies() -> DeviceMesh:
    """The mesh of all of the pool's ranks, one for all jobs.

    Its dim has a name that no other test uses. DTensor treats equal meshes as the same mesh, and
    would use the groups of the first one."""
    dist.Backend.register_backend("switched", made, extended_api=True, devices=["cpu"])
    return init_device_mesh(
        "cpu",
        (dist.get_world_size(),),
        mesh_dim_names=("dp.edp",),
        backend_override={"dp.edp": "switched"},
    )


@contextmanager
def copying(mode: str, stage: int) -> Iterator[tuple[DeviceMesh, Switched]]:
    mesh, module = mesh_of_copies(), dtron.distributed.copy_engine
    group = mesh.get_group()
    group.mode, group.copied = mode, 0
    group._registered, group._staging, group._stagings = None, None, 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STAGING_BYTES", stage)
        if mode == "one place":
            patch.setattr(module, "aligned_bytes", lambda x: 0)
        yield mesh, group
