"""The memory and the messages of a plan, against simulated ranks and torch's own trackers."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from dtron.distributed.mesh_shape import MeshShape
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.moe.config import MoEConfig
from dtron.params import init
from dtron.planner import rank_trace
from dtron.planner.plan_step import RankPlan, plan_ranks
from dtron.rules import rules_for
from dtron.runtime.config import DataConfig, PipelineConfig, RunConfig
from dtron.testing import assert_caught
from dtron.tools.show import rows
from dtron.tools.verify_step import one_step, plan_of
from dtron.training.build import build_step
from dtron.training.config import RunPlan
from dtron.training.pipeline import pipeline
from tests.helpers.examples import examples
from tests.helpers.same_step import model_config

MESHES = ["dp=2", "tp=2", "dp=2,tp=2", "cp=2", "dp_replicate=2,dp=2", "dp=4"]


def compiled_plan(config: RunConfig) -> RunPlan:
    shape = MeshShape.parse(config.mesh)
    eager = plan_of(config, shape, torch.bfloat16)
    return replace(eager, device="cuda", compile=True, cuda_graph=True)


def planned(config: RunConfig) -> list[RankPlan]:
    return plan_ranks(config, compiled_plan(config))


def messages(ops) -> tuple[Counter, Counter]:
    """Count the collectives of a step's gradients, and their bytes, by kind and axis."""
    count, size = Counter(), Counter()
    for op in ops:
        if op.kind == "mark" and op.name == "reduce":
            break
        if op.kind == "collective":
            count[op.name] += 1
            size[op.name] += op.written
    return count, size


# ---- bytes and messages, against simulated ranks


@settings(max_examples=examples(4))
@given(mesh=st.sampled_from(MESHES), zero=st.sampled_from([0, 1, 2, 3]))
def test_an_eager_step_sends_what_simulated_ranks_send(mesh, zero):
    assert_same_messages(mesh, zero)


def assert_same_messages(mesh: str, zero: int) -> None:
    shape = MeshShape.parse(mesh)
    config = model_config(mesh, 2, zero=zero, batch=2 * shape.data, micro_batch=2)
    want = one_step(config, shape).collectives
    (got,) = plan_ranks(config, plan_of(config, shape, torch.float64))
    count, size = messages(got.operators)
    kinds: Counter = Counter()
    nbytes: Counter = Counter()
    for key, n in want.count.items():
        kinds[key.kind] += n
        nbytes[key.kind] += want.bytes[key]
    assert (count, size) == (kinds, nbytes)


def test_the_bytes_of_a_shard_are_caught():
    """Mutant: an all-gather has the bytes of its input."""
    made = rank_trace.library_operator

    def of_the_shard(*args):
        op = made(*args)
        return replace(op, written=op.read) if op.name == "all_gather" else op

    assert_same_messages("dp=2,tp=2", 3)
    with mock.patch.object(rank_trace, "library_operator", of_the_shard):
        assert_caught(lambda: assert_same_messages("dp=2,tp=2", 3))


@settings(max_examples=examples(4))
@given(
    mesh=st.sampled_from(MESHES),
    zero=st.sampled_from([0, 1, 2, 3]),
    experts=st.booleans(),
)
def test_the_state_is_that_of_show(mesh, zero, experts):
    """The bytes of weights, copies and optimizer state, but for the allocator's blocks of 512."""
    moe = MoEConfig(4, 2, 8) if experts else MoEConfig()
    config = model_config(mesh, 1, zero=zero, batch=8, micro_batch=1, moe=moe, embed=16)
    (got,) = planned(config)
    shown = rows(config.model, MeshShape.parse(mesh), zero)
    state = sum(got.state.values())
    # ``show`` counts copies that ZeRO 1 and 2 gather in the step, too.
    want = sum(r.optimizer for r in shown)
    blocks = 512 * 4 * sum(r.count for r in shown)
    assert want <= got.state["optimizer"] <= want + blocks
    assert got.state["copies"] * 2 <= got.state["parameters"] + 2 * blocks
    assert state <= sum(r.params + r.optimizer for r in shown) + blocks


# ---- torch's own trackers


def eager_step(config: RunConfig, around) -> None:
    """Take the gradients of one device on fake tensors, inside of a context."""
    with FakeTensorMode():
        plan = plan_of(config, MeshShape(), torch.float32)
        layout = Layout(None, rules_for(0))
        pipe = pipeline(config, MeshShape(), plan.count, config.data.seq_len, layout)
        params = tuple(init(s, config.model.dims(), 0, layout) for s in pipe.spec)
        ids = torch.ones(plan.rows, config.data.seq_len + 1, dtype=torch.long)
        batches = [make_batch(ids, layout) for _ in range(plan.count)]
        step = build_step(config, plan, pipe)
        with around:
            step.gradients(params, batches)


LARGER = {"vocab": 64, "embed": 64, "head_dim": 32, "mlp": 256, "layers": 6}
SIZES = {"vocab": 512, "embed": 64, "head_dim": 32, "mlp": 128, "layers": 3}


@settings(max_examples=examples(3))
@given(
    recompute=st.sampled_from(["none", "selective", "full"]),
    rows=st.integers(1, 3),
    count=st.integers(1, 2),
)
def test_the_peak_of_an_eager_step_is_that_of_mem_tracker(recompute, rows, count):
    assert_same_peak(recompute, rows, count)


def assert_same_peak(recompute: str, rows: int, count: int) -> None:
    config = model_config(
        "dp=1", 2, recompute=recompute, batch=rows * count, micro_batch=rows, **SIZES
    )
    tracker, trace = MemTracker(), rank_trace.RankTrace()
    eager_step(config, tracker)
    eager_step(config, trace)
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert abs(trace.memory.largest / peak - 1) < 0.02  # blocks of 512 bytes


def test_storages_that_are_never_freed_are_caught():
    class Kept(rank_trace.Memory):
        def add(self, kind, n):
            super().add(kind, max(n, 0))

    with mock.patch.object(rank_trace, "Memory", Kept):
        assert_caught(lambda: assert_same_peak("full", 2, 2))


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_flops_are_those_of_torch(recompute):
    """Matmuls, against torch's counter: attention on a CPU runs as matmuls or as one kernel."""
    config = model_config("dp=1", 2, recompute=recompute, batch=2, micro_batch=2, **SIZES)
    counter, trace = FlopCounterMode(display=False), rank_trace.RankTrace()
    eager_step(config, counter)
    eager_step(config, trace)
    by_name = counter.get_flop_counts()["Global"]
    want = sum(n for op, n in by_name.items() if "attention" not in str(op))
    assert sum(op.flops for op in trace.operators if op.kind == "matmul") == want


# ---- compiled steps


def test_recompute_keeps_less():
    peaks = {}
    for recompute in ("none", "selective", "full"):
        config = model_config("dp=1", 2, recompute=recompute, batch=8, micro_batch=8, **LARGER)
        (rank,) = planned(config)
        peaks[recompute] = rank.largest - sum(rank.state.values())
    assert peaks["none"] > peaks["selective"] > peaks["full"] > 0


@pytest.mark.parametrize(
    ("mesh", "choices"),
    [
        ("cp=2", {"pattern": "LA", "layers": 2}),  # states of linear attention pass over cp
        ("tp=2", {"window": 5}),  # flex
        ("dp=2,ep=2", {"moe": MoEConfig(4, 2, 8), "embed": 16, "fp8": "none"}),
        (
            "dp=1",
            {"recompute": "offload", "batch": 512, "micro_batch": 512, "mlp": 512, "layers": 3},
        ),
    ],
)
def test_other_layers_have_plans(mesh, choices):
    shape = MeshShape.parse(mesh)
    usual = {"batch": 2 * shape.data, "micro_batch": 2, "head_dim": 16}
    config = model_config(mesh, 2, **usual | choices)
    config = replace(config, data=DataConfig(seq_len=12, document_mask=True))
    (rank,) = planned(config)
    kinds = {op.kind for op in rank.operators}
    assert {"matmul", "attention"} <= kinds and rank.largest > sum(rank.state.values())
    assert ("host" in kinds) == (rank.host > 0) == (config.recompute == "offload")


def test_a_pipeline_keeps_a_microbatch_for_each_later_stage():
    """1F1B: stage s of n has n - s microbatches in flight. Each message that a rank sends is
    received."""
    sizes = SIZES | {"layers": 4}
    choices = {"batch": 6, "micro_batch": 1, "pipeline": PipelineConfig("1f1b")}
    ranks = planned(model_config("pp=4", 2, **choices, **sizes))
    kept = [r.peak["activations"] for r in ranks[:3]]
    assert kept[0] > kept[1] > kept[2]
    sent, received = Counter(), Counter()
    for rank in ranks:
        for op in rank.operators:
            way, _, name = op.name.partition(" ")
            if op.kind == "message":
                (sent if way == "send" else received)[name, op.written] += 1
    assert sent == received and len(sent) == 2 * 3 * 6


def test_a_graph_allocates_what_it_frees():
    """After the step only the state and the batch are left."""
    config = model_config("dp=2,tp=2", 2, zero=3, batch=4, micro_batch=1, **SIZES)
    traces = []

    class Seen(rank_trace.RankTrace):
        def __init__(self):
            super().__init__()
            traces.append(self)

    with mock.patch("dtron.planner.plan_step.RankTrace", Seen):
        planned(config)
    gc.collect()
    left = {kind: n for kind, n in traces[0].memory.live.items() if n}
    assert left == {}
