"""Collectives as copies: on real gloo ranks, with memory that is made known at barriers in place of
symmetric memory. What is not known at a barrier is not there, as little as on a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from datetime import timedelta
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.fx import Graph

import dtron.distributed.copy_engine
import dtron.distributed.symmetric_memory
import dtron.training.compiled_stage
from dtron.distributed.copy_engine import CopyEngineGroup
from dtron.distributed.copy_stream import CopyStream
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full
from dtron.distributed.symmetric_memory import backends
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.params import init
from dtron.rules import rules_for, zero_axes
from dtron.runtime.config import DataConfig, RunConfig
from dtron.training.compiled_stage import compiled
from dtron.training.optimizer import init_state, with_compute_copies
from dtron.training.pipeline import one_stage, program
from dtron.training.step import TrainStep
from dtron.training.zero3_prefetch import Zero3Prefetch
from dtron.tree import flat
from tests.helpers.pool import RANKS
from tests.helpers.runs import MODEL, train
from tests.helpers.values import ADAMW

pytestmark = pytest.mark.xdist_group("pool")

OPS, ATEN = torch.ops._c10d_functional, torch.ops.aten


class Snapshots:
    """A Room whose memory the ranks see as it was at the last barrier. ``raced``: whether what a
    rank has read since then was written before the next one, so that it could have come too
    late."""

    def __init__(self, memory: torch.Tensor):
        self.memory, self.seen, self.read, self.raced = (
            memory,
            [torch.zeros_like(memory)] * RANKS,
            [],
            False,
        )

    def barrier(self, channel: int = 0, timeout_ms: int = 0) -> None:
        before, self.seen = self.seen, [torch.empty_like(self.memory) for _ in range(RANKS)]
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
    """Copies, counted; or all by gloo ("rest"); or a mutant: nothing is put where others read;
    nobody says that weights have moved; the wrong part is sent; the stage has one half; what is
    sent together lies in one place."""

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
    """All of the pool's ranks. One for all jobs, under a name of dp that no other test's mesh has:
    DTensor takes equal meshes for one, and would go on with the groups of that which it saw
    first."""
    dist.Backend.register_backend("switched", made, extended_api=True, devices=["cpu"])
    return init_device_mesh(
        "cpu", (RANKS,), mesh_dim_names=("dp.edp",), backend_override={"dp.edp": "switched"}
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


def collectives_on_pool(mode: str, seed: int) -> tuple[list[bool], int]:
    """A job for the pool: whether each of some collectives gives what gloo's own gives, and nothing
    was written too early; and how many of them were copies."""
    rank, random = dist.get_rank(), torch.Generator().manual_seed(seed)
    draw = lambda high: int(torch.randint(1, high, (), generator=random))
    with copying(mode, 2**12) as (_, group):
        world = dist.group.WORLD.group_name
        name, same = group.group_name, []
        sizes = [(draw(9), draw(9)) for _ in range(4)] + [
            (64, 48)
        ]  # the last is larger than the stage
        dtypes = [torch.float32, torch.bfloat16, torch.int64]
        values = [
            torch.randn(n, m, generator=torch.Generator().manual_seed(seed + rank + 10 * i)).mul(99)
            for i, (n, m) in enumerate(sizes)
        ]
        weights = [v.to(dtypes[i % 3]) for i, v in enumerate(values)]
        memory, near = torch.zeros(len(weights) * 2**13, dtype=torch.uint8), []
        for w, room in zip(weights, memory.split(2**13), strict=True):
            near.append(room[: w.nbytes].view(w.dtype).view(w.shape).copy_(w))
        group.register(memory)
        rows = [
            w.repeat(RANKS - 1, 1, 1) + torch.arange(RANKS - 1)[:, None, None] + 9 * rank
            for w in weights
        ]
        for x in [*weights, *near, *rows]:
            both = [OPS.wait_tensor(OPS.all_gather_into_tensor(x, RANKS, g)) for g in (world, name)]
            same.append(torch.equal(*both))
        one_each = [int(i != rank) for i in range(RANKS)]
        swap = lambda x, g: OPS.all_to_all_single(x, one_each, one_each, g)
        for x in rows:
            both = [OPS.wait_tensor(swap(x, g)) for g in (world, name)]
            same.append(torch.equal(*both))
        for order in (1, -1):  # many are on their way, and waited for in any order
            swaps = lambda g: [swap(x, g) for x in rows]
            pairs = list(zip(swaps(world), swaps(name), strict=True))[::order]
            same += [torch.equal(*map(OPS.wait_tensor, pair)) for pair in pairs]
        uneven = [[draw(3) for _ in range(RANKS)] for _ in range(RANKS)]  # what each sends to each
        # Rows of experts that are as many for rank 0 as where pieces of gradients are swapped, for
        # it alone.
        uneven[0], uneven[1:] = [0] + [1] * (RANKS - 1), [[1, *row[1:]] for row in uneven[1:]]
        sent, received = uneven[rank], [row[rank] for row in uneven]
        x = torch.randn(sum(sent), 3, generator=torch.Generator().manual_seed(rank))
        both = [OPS.wait_tensor(OPS.all_to_all_single(x, received, sent, g)) for g in (world, name)]
        same.append(torch.equal(*both))
        both = [OPS.wait_tensor(OPS.all_reduce(x[:3], "sum", g)) for g in (world, name)]
        same.append(torch.equal(*both))
        for w in near:  # weights move, and are gathered again
            w.add_(1)
        group.publish()
        for w in near:
            both = [OPS.wait_tensor(OPS.all_gather_into_tensor(w, RANKS, g)) for g in (world, name)]
            same.append(torch.equal(*both))
        return [*same, not group.raced], group.copied


@pytest.mark.parametrize("seed", range(3))
def test_copies_are_the_collectives(pool, seed):
    for same, copied in pool.run(collectives_on_pool, "copies", seed):
        assert [i for i, x in enumerate(same) if not x] == [] and copied >= 20


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_notices(pool, mutant):
    assert not all(all(same) for same, _ in pool.run(collectives_on_pool, mutant, 0))


def training_on_pool(mode: str, embed: int) -> tuple[list[float], list[float], bool, int, bool]:
    """A job for the pool: losses and norms under ZeRO-3 with copies of weights in bfloat16, and
    whether anything was written too early; how many collectives were copies, and whether weights
    are in reach."""
    model = replace(MODEL, embed=embed)
    config = RunConfig(model=model, batch=8, steps=3, zero=3, data=DataConfig(seq_len=8))
    with copying(mode, 2**16) as (mesh, group):
        history = train(
            Layout(mesh, rules_for(3), compute=torch.bfloat16), MeshShape(dp=RANKS), config
        )
        return (
            history.losses,
            history.norms,
            group.raced,
            group.copied,
            group._registered is not None,
        )


@cache
def trained(pool, mode: str, embed: int = 24) -> tuple[list[float], list[float], bool, int, bool]:
    """What rank 0 says; of "rest" several tests ask."""
    return pool.run(training_on_pool, mode, embed)[0]


@pytest.mark.parametrize(("embed", "in_reach"), [(24, True), (26, False)])
def test_training_is_the_same_to_the_last_bit(pool, embed, in_reach):
    """Parts of one size are pulled from where they are; others are padded first, and so staged."""
    want, got = (trained(pool, mode, embed) for mode in ("rest", "copies"))
    assert got[:3] == want[:3] and got[4] == in_reach and want[3] == 0
    assert got[3] >= 3 * MODEL.layers * 7 * 2  # at least two gathers of each matrix a step


@pytest.mark.parametrize("mutant", MUTANTS[:-1])
def test_training_that_goes_wrong_is_noticed(pool, mutant):
    want, got = (trained(pool, mode) for mode in ("rest", mutant))
    assert got[:3] != want[:3]


def hidden(graph: Graph) -> dict[str, list[int]]:
    """For each kind of collective, behind how many products each is on its way."""
    place = {n: i for i, n in enumerate(graph.nodes)}
    products = [place[n] for n in graph.nodes if n.target in (ATEN.mm.default, ATEN.addmm.default)]
    found: dict[str, list[int]] = {}
    for n in graph.nodes:
        kind = (
            str(n.target).split(".")[1]
            if getattr(n.target, "namespace", "") == "_c10d_functional"
            else ""
        )
        outs = [x for out in n.users for x in (out.users if kind.endswith("coalesced") else (out,))]
        if kind and kind != "wait_tensor":
            wait = min(place[x] for x in outs)
            found.setdefault(kind, []).append(sum(place[n] < p < wait for p in products))
    return found


BLOCK = replace(MODEL, layers=1)


def compiled_on_pool(
    runs: list[tuple[str, str]], bucket: int
) -> tuple[list[list[float]], dict[str, list]]:
    """A job for the pool: losses and norms of weights of three steps under ZeRO-3, compiled, for
    each of these runs: its mode, and whether it is of the graphs as they were ("plain") or of those
    whose collectives were put in order ("ahead", ``bucket`` bytes of weights). And what the graphs
    of both kinds hide. All is traced once."""
    torch.compiler.reset()
    graphs, chosen, rows = {"plain": [], "ahead": []}, [""], torch.arange(8 * 17).view(8, 17) % 61

    def both(module, _):
        made = {"plain": deepcopy(module), "ahead": module}
        Zero3Prefetch(mesh.get_group().group_name, bucket)(module.graph)
        module.recompile()
        for kind, one in made.items():
            graphs[kind].append(hidden(one.graph))
        return make_boxed_func(lambda *args: made[chosen[0]](*args))

    backend = aot_autograd(fw_compiler=both, partition_fn=min_cut_rematerialization_partition)
    functions, histories = None, []
    for mode, chosen[0] in runs:
        with copying(mode, 2**16) as (mesh, _):
            layout = Layout(mesh, rules_for(3), compute=torch.bfloat16)
            pipe = one_stage(BLOCK, 1, layout)
            functions = functions or compiled(
                program(BLOCK, layout, splits=False), layout, backend=backend
            )
            params = init(pipe.spec, BLOCK.dims(), 0, layout)
            opt, found = (
                with_compute_copies(
                    init_state(ADAMW, pipe.spec, params), params, pipe.spec, layout.compute
                ),
                [],
            )
            step = TrainStep(functions, pipe, RunConfig(model=BLOCK, zero=3), ADAMW)
            for _ in range(3):
                loss, _, _, params, opt = step(params, opt, [make_batch(rows, layout)], 128, 1e-2)
                found += [full(loss).item(), *(full(w).norm().item() for w in flat(params))]
            histories.append(found)
    return histories, graphs


def test_a_compiled_stage_in_order_is_the_same_to_the_last_bit(pool):
    runs = [("copies", "plain"), ("copies", "ahead"), ("one place", "ahead")]
    (want, got, mutant), graphs = pool.run(compiled_on_pool, runs, 2**11)[0]
    assert got == want != mutant
    plain, ahead = graphs["plain"], graphs["ahead"]
    assert not any(any(behind) for graph in plain for behind in graph.values())
    (_, forward, backward, *_), matrices = ahead, 7 * BLOCK.layers + 1  # the head
    assert len(plain[1]["all_gather_into_tensor"]) == matrices
    assert forward.keys() == {"all_gather_into_tensor_coalesced"}
    assert backward.keys() == {"all_gather_into_tensor_coalesced", "all_to_all_single"}
    assert len(backward["all_to_all_single"]) == matrices and all(backward["all_to_all_single"])
    for first, *rest in (x["all_gather_into_tensor_coalesced"] for x in (forward, backward)):
        assert len(rest) >= 2 and all(behind > first for behind in rest)


class Stream:
    """A stream that writes down what it waits for. Its events are how many copies there were
    before."""

    copies = 0

    def __init__(self, **_):
        self.waits = []

    def wait_event(self, event):
        self.waits.append(event.copies)

    def wait_stream(self, other):
        pass


class Event:
    def record(self):
        self.copies = Stream.copies


@given(st.lists(st.one_of(st.just("ask"), st.integers(0, 5)), max_size=60))
def test_a_wait_is_for_the_copy_and_never_for_what_was_just_asked_for(plan):
    """A number waits for the copy that is so many before the last."""
    main, Stream.copies, asked, before = Stream(), 0, [], 0
    with pytest.MonkeyPatch.context() as patch:
        for name, fake in (
            ("Stream", Stream),
            ("Event", Event),
            ("current_stream", lambda: main),
            ("stream", nullcontext),
        ):
            patch.setattr(torch.cuda, name, fake)
        beside = CopyStream("cuda")
        for step in plan:
            if step == "ask":
                asked.append(beside.do(lambda: setattr(Stream, "copies", Stream.copies + 1)))
            elif step < len(asked):
                mine, waited = len(asked) - step, max(main.waits, default=0)
                asked[mine - 1]()
                assert max(main.waits) == (waited if waited >= mine else max(mine, before))
                before = len(asked)
        assert main.waits == sorted({*main.waits})  # none that another covers


def test_memory_that_cannot_be_shared_is_one_clear_line(monkeypatch):
    import torch.distributed._symmetric_memory as symmetric

    def fails(memory, group):
        raise RuntimeError("pidfd_getfd: Operation not permitted\nException raised from ...")

    monkeypatch.setattr(symmetric, "rendezvous", fails)
    with pytest.raises(ValueError, match=r"not permitted\); use --copy-engines off$"):
        dtron.distributed.symmetric_memory._rendezvous(torch.empty(0), "1.copies")


def test_nothing_is_carried_where_there_is_no_mesh():
    """As in a pipeline whose stages are of one rank."""
    assert not dtron.distributed.symmetric_memory.copy_engine_groups(None)


def test_weights_gathered_over_one_group_alone(monkeypatch):
    """Where cp is within a host and dp is not, only that over cp is of copies, and weights go over
    both."""
    alone = lambda *names: dtron.training.compiled_stage._weight_gather_group(
        SimpleNamespace(mesh_dim_names=names)
    )
    monkeypatch.setattr(
        dtron.distributed.symmetric_memory, "copy_engine_groups", lambda mesh: ["one"]
    )
    assert alone("dp", "tp") == alone("dp_replicate", "dp") == "one" and alone("dp", "cp") is None
    monkeypatch.setattr(dtron.distributed.symmetric_memory, "copy_engine_groups", lambda mesh: [])
    assert (
        alone("dp", "tp") is None
        and dtron.training.compiled_stage._weight_gather_group(None) is None
    )


def test_one_host_and_gpus_that_reach_each_other_or_nothing(monkeypatch):
    monkeypatch.setattr(
        dtron.distributed.symmetric_memory, "_gpus_access_each_other", lambda count: True
    )
    monkeypatch.setattr(dist.Backend, "COPIES", "copies", raising=False)
    axes = lambda shape: zero_axes(tuple(shape.atoms))
    found = lambda mesh: set(backends(s := MeshShape.parse(mesh), "cuda", axes(s)) or ())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert (
        found("dp=8") == {"dp"}
        and found("dp=4,cp=2") == {"dp", "cp"}
        and found("dp=2,tp=4") == {"dp"}
    )
    assert found("pp=2,dp=4") == {"dp"} and found("tp=8") == set() and found("") == set()
    assert found("dp=16") == set() and found("dp=4,cp=4") == {"cp"} and found("dp=4,tp=4") == set()
    assert backends(MeshShape.parse("dp=8"), "cpu", ["dp"]) is None
    monkeypatch.setattr(
        dtron.distributed.symmetric_memory, "_gpus_access_each_other", lambda count: False
    )
    assert found("dp=8") == set()
