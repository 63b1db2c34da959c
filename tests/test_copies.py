"""Collectives as copies: on real gloo ranks, with memory that is made known at barriers in place of symmetric
memory. What is not known at a barrier is not there, as little as on a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import cache

import pytest
import torch
import torch.distributed as dist
from pool import RANKS
from runs import MODEL, train
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import dtron.copies
from dtron.config import DataConfig, RunConfig
from dtron.copies import Copies, backends
from dtron.mesh import Layout
from dtron.rules import rules_for
from dtron.shape import MeshShape

pytestmark = pytest.mark.xdist_group("pool")

OPS = torch.ops._c10d_functional


class Snapshots:
    """A Room whose memory the ranks see as it was at the last barrier."""

    def __init__(self, memory: torch.Tensor):
        self.memory, self.seen = memory, [torch.zeros_like(memory)] * RANKS

    def barrier(self, channel: int = 0, timeout_ms: int = 0) -> None:
        self.seen = [torch.empty_like(self.memory) for _ in range(RANKS)]
        dist.all_gather(self.seen, self.memory)

    def get_buffer(self, rank, sizes, dtype, storage_offset):
        n = math.prod(sizes)
        return self.seen[rank].view(dtype)[storage_offset : storage_offset + n].view(sizes)


MUTANTS = ("unstaged", "early", "other's")


class Switched(Copies):
    """Copies, counted; or all by gloo ("rest"); or a mutant: nothing is put where others read; a weight is
    read before it is known to be there; the wrong part is sent."""

    mode, copied = "copies", 0

    def _fits(self, x):
        return self.mode != "rest" and super()._fits(x)

    def _at(self, x):
        return None if self.mode == "rest" else super()._at(x)

    def _copied(self, *args):
        self.copied += 1
        return super()._copied(*args)

    def _staged(self, device, parts):
        return super()._staged(device, [] if self.mode == "unstaged" else parts)

    def _gather(self, out, x):
        if self.mode != "early" or self._at(x) is None:
            return super()._gather(out, x)
        room = self._near[1]
        room.barrier, barrier = (lambda **_: None), room.barrier
        super()._gather(out, x)
        room.barrier = barrier

    def _swap(self, out, x):
        other = x.view(self._size, -1).roll(1, 0).view(-1) if self.mode == "other's" else x
        super()._swap(out, other)


def made(group, options) -> Switched:
    store = dist.PrefixStore("gloo", group.store)
    gloo = dist.ProcessGroupGloo(store, group.group_rank, group.group_size, group.timeout)
    return Switched(gloo, group.group_rank, group.group_size, "cpu", Snapshots, timedelta(seconds=60))


@cache
def mesh_of_copies() -> DeviceMesh:
    """All of the pool's ranks. One for all jobs, under a name of dp that no other test's mesh has: DTensor
    takes equal meshes for one, and would go on with the groups of that which it saw first."""
    dist.Backend.register_backend("switched", made, extended_api=True, devices=["cpu"])
    return init_device_mesh(
        "cpu", (RANKS,), mesh_dim_names=("dp.edp",), backend_override={"dp.edp": "switched"}
    )


@contextmanager
def copying(mode: str, stage: int) -> Iterator[tuple[DeviceMesh, Switched]]:
    mesh, before = mesh_of_copies(), dtron.copies.STAGE
    dtron.copies.STAGE, group = stage, mesh.get_group()
    group.mode, group.copied, group._near, group._stage = mode, 0, None, None
    try:
        yield mesh, group
    finally:
        dtron.copies.STAGE = before


def collectives_on_pool(mode: str, seed: int) -> tuple[list[bool], int]:
    """A job for the pool: whether each of some collectives gives what gloo's own gives, and how many of them
    were copies."""
    rank, random = dist.get_rank(), torch.Generator().manual_seed(seed)
    draw = lambda high: int(torch.randint(1, high, (), generator=random))
    with copying(mode, 2**12) as (_, group):
        world = dist.group.WORLD.group_name
        name, same = group.group_name, []
        sizes = [(draw(9), draw(9)) for _ in range(4)] + [(64, 48)]  # the last is larger than the stage
        dtypes = [torch.float32, torch.bfloat16, torch.int64]
        values = [
            torch.randn(n, m, generator=torch.Generator().manual_seed(seed + rank + 10 * i)).mul(99)
            for i, (n, m) in enumerate(sizes)
        ]
        weights = [v.to(dtypes[i % 3]) for i, v in enumerate(values)]
        group.meet(memory := torch.zeros(len(weights) * 2**13, dtype=torch.uint8))
        near = []
        for w, room in zip(weights, memory.split(2**13), strict=True):
            near.append(room[: w.nbytes].view(w.dtype).view(w.shape).copy_(w))
        for x in [
            *weights,
            *near,
            *[w.repeat(RANKS, 1) + torch.arange(RANKS * len(w))[:, None] for w in weights],
        ]:
            both = [OPS.wait_tensor(OPS.all_gather_into_tensor(x, RANKS, g)) for g in (world, name)]
            same.append(torch.equal(*both))
            if len(x) % RANKS == 0:
                splits = [len(x) // RANKS] * RANKS
                both = [OPS.wait_tensor(OPS.all_to_all_single(x, splits, splits, g)) for g in (world, name)]
                same.append(torch.equal(*both))
        uneven = [[draw(3) for _ in range(RANKS)] for _ in range(RANKS)]  # what each sends to each
        sent, received = uneven[rank], [row[rank] for row in uneven]
        x = torch.randn(sum(sent), 3, generator=torch.Generator().manual_seed(rank))
        both = [OPS.wait_tensor(OPS.all_to_all_single(x, received, sent, g)) for g in (world, name)]
        same.append(torch.equal(*both))
        both = [OPS.wait_tensor(OPS.all_reduce(x[:3], "sum", g)) for g in (world, name)]
        same.append(torch.equal(*both))
        for w in near:  # a weight moves, and is gathered again
            w.add_(1)
            both = [OPS.wait_tensor(OPS.all_gather_into_tensor(w, RANKS, g)) for g in (world, name)]
            same.append(torch.equal(*both))
        return same, group.copied


@pytest.mark.parametrize("seed", range(3))
def test_copies_are_the_collectives(pool, seed):
    for same, copied in pool.run(collectives_on_pool, "copies", seed):
        assert all(same) and copied >= 20


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_notices(pool, mutant):
    assert not all(all(same) for same, _ in pool.run(collectives_on_pool, mutant, 0))


def training_on_pool(mode: str, embed: int) -> tuple[list[float], list[float], int, bool]:
    """A job for the pool: losses and norms under ZeRO-3 with copies of weights in bfloat16; how many
    collectives were copies, and whether weights are in reach."""
    model = replace(MODEL, embed=embed)
    config = RunConfig(model=model, batch=8, steps=3, zero=3, data=DataConfig(sequence=8))
    with copying(mode, 2**16) as (mesh, group):
        history = train(Layout(mesh, rules_for(3), compute=torch.bfloat16), MeshShape(dp=RANKS), config)
        return history.losses, history.norms, group.copied, group._near is not None


@pytest.mark.parametrize(("embed", "in_reach"), [(24, True), (26, False)])
def test_training_is_the_same_to_the_last_bit(pool, embed, in_reach):
    """Parts of one size are pulled from where they are; others are padded first, and so staged."""
    want, got = (pool.run(training_on_pool, mode, embed)[0] for mode in ("rest", "copies"))
    assert got[:2] == want[:2] and got[3] == in_reach and want[2] == 0
    assert got[2] >= 3 * MODEL.layers * 7 * 2  # at least two gathers of each matrix a step


@pytest.mark.parametrize("mutant", MUTANTS)
def test_training_that_goes_wrong_is_noticed(pool, mutant):
    want, got = (pool.run(training_on_pool, mode, 24)[0] for mode in ("rest", mutant))
    assert got[:2] != want[:2]


def test_memory_that_cannot_be_shared_is_one_clear_line(monkeypatch):
    import torch.distributed._symmetric_memory as symmetric

    def fails(memory, group):
        raise RuntimeError("pidfd_getfd: Operation not permitted\nException raised from ...")

    monkeypatch.setattr(symmetric, "rendezvous", fails)
    with pytest.raises(ValueError, match=r"not permitted\); use --copy-engines off$"):
        dtron.copies._met(torch.empty(0), "1.copies")


def test_nothing_is_carried_where_there_is_no_mesh():
    """As in a pipeline whose stages are of one rank."""
    assert not dtron.copies.carried(None)


def test_one_host_and_gpus_that_reach_each_other_or_nothing(monkeypatch):
    monkeypatch.setattr(dtron.copies, "_peers", lambda count: True)
    monkeypatch.setattr(dist.Backend, "COPIES", "copies", raising=False)
    found = lambda mesh: set(backends(MeshShape.parse(mesh), "cuda") or ())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert found("dp=8") == {"dp"} and found("dp=4,cp=2") == {"dp", "cp"} and found("dp=2,tp=4") == {"dp"}
    assert found("pp=2,dp=4") == {"dp"} and found("tp=8") == set() and found("") == set()
    assert found("dp=16") == set() and found("dp=4,cp=4") == {"cp"} and found("dp=4,tp=4") == set()
    assert backends(MeshShape.parse("dp=8"), "cpu") is None
    monkeypatch.setattr(dtron.copies, "_peers", lambda count: False)
    assert found("dp=8") == set()
