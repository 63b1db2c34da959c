"""Activations that move to the host and back are the same numbers.

Each step is compared with one device that keeps everything (to 1e-9), and with the same mesh that
keeps everything: to the bit, because nothing is computed otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from dtron.distributed.host_memory import HostMemory, buffer_size
from dtron.distributed.mesh_shape import MeshShape
from dtron.mesh import Layout
from dtron.model import activation_offload
from dtron.model.activation_checkpoint import MOVE, STAY, offload, policy_for
from dtron.model.activation_offload import BlockActivations
from dtron.model.batch import make_batch
from dtron.model.compute_config import ComputeConfig
from dtron.model.config import ModelConfig
from dtron.model.mtp import MTPConfig
from dtron.model.transformer import declare_model, embed, stage
from dtron.moe.config import MoEConfig
from dtron.params import init
from dtron.runtime.config import PipelineConfig, RunConfig
from dtron.testing import assert_caught, meshes, zero_stages
from dtron.tools.compare_steps import compare
from dtron.tools.verify_step import one_step
from dtron.tree import tree_map
from tests.helpers.examples import KINDS, examples, seen
from tests.helpers.offloading import (
    buffers_given_back_too_early,
    buffers_of_the_newest_microbatch,
    everything_moves,
)
from tests.helpers.same_step import assert_same_result, model_config


@pytest.fixture(autouse=True)
def moves():
    with everything_moves():
        yield


def config(mesh: str, **choices: Any) -> RunConfig:
    choices = {"layers": 3, "batch": 2 * MeshShape.parse(mesh).data, "micro_batch": 2} | choices
    return model_config(mesh, 2, recompute="offload", **choices)


def assert_same_to_the_bit(c: RunConfig) -> None:
    shape = MeshShape.parse(c.mesh)
    keeps_all = replace(c, recompute="none", recompute_budget=None)
    loss, rows = compare(one_step(keeps_all, shape), one_step(c, shape))
    assert loss == 0
    for row in rows:
        assert row.grad == 0 and row.weight == 0, row


@settings(max_examples=examples(1, thorough=20))
@seen(mesh=KINDS, zero=[3, 0, 1, 2], seed=[0])
@given(mesh=meshes(), zero=zero_stages(), seed=st.integers(0, 99))
def test_a_mesh_follows_one_device_that_keeps_all(mesh, zero, seed):
    c = config(mesh, zero=zero, seed=seed, layers=2)
    want = one_step(replace(c, mesh="", recompute="none"), MeshShape())
    assert_same_result(want, one_step(c, MeshShape.parse(mesh)))


MOE = MoEConfig(experts=4, top_k=2, mlp=8)


@pytest.mark.parametrize(
    ("mesh", "choices"),
    [
        ("dp=1", {}),
        ("dp=2,tp=2", {"zero": 3}),
        ("cp=2", {"zero": 1}),
        ("dp=2,ep=2", {"moe": MOE, "zero": 3}),
        ("dp=2,ep=2", {"moe": MOE, "moe_dispatch": "static", "zero": 1}),
        ("dp=2", {"mtp": MTPConfig(depth=2), "zero": 3}),
        ("dp=1", {"recompute_budget": 0.5, "layers": 5}),
        ("pp=2,dp=2", {"layers": 6, "zero": 1, "batch": 8, "micro_batch": 1}),
        ("pp=2", {"layers": 6, "zero": 3, "zero3_gather": "microbatch", "batch": 4}),
        *(
            ("pp=2", {"layers": 8, "batch": 8, "pipeline": PipelineConfig(schedule)})
            for schedule in ("interleaved", "zb-h1", "dualpipe-v")
        ),
    ],
)
def test_the_same_mesh_to_the_bit(mesh, choices):
    micro = {"micro_batch": 1} if "pp" in mesh else {}
    assert_same_to_the_bit(config(mesh, **micro | choices))


@pytest.mark.parametrize("fault", [buffers_given_back_too_early, buffers_of_the_newest_microbatch])
@pytest.mark.parametrize(("mesh", "layers"), [("dp=1", 4), ("pp=2", 4)])
def test_faults_of_buffers_are_caught(fault, mesh, layers):
    """In a pipeline, the first stage has one block that moves, in two microbatches."""
    c = config(mesh, layers=layers, batch=4, micro_batch=1)
    with fault():
        assert_caught(lambda: assert_same_to_the_bit(c))


SMALL = ModelConfig(vocab=32, embed=64, heads=4, kv_heads=2, head_dim=16, mlp=128, context=128)


def bytes_after_forward(how: ComputeConfig, layers: int) -> tuple[int, int]:
    """Bytes that the eager program has allocated and not freed between forward and backward, on the
    device and on the host, by torch's own record of its memory."""
    m, layout, host = replace(SMALL, layers=layers), Layout(), HostMemory()
    params = tree_map(lambda w: w.requires_grad_(), init(declare_model(m), m.dims(), 0, layout))
    batch = make_batch(torch.zeros(2, m.context + 1, dtype=torch.long), layout)
    x_TD = embed(params, batch, m, layout)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = stage(params, x_TD, batch, m=m, layout=layout, how=how, host=host)
    total = sum(event.self_cpu_memory_usage for event in record.events())
    assert result[0].requires_grad
    return total - host.allocated, host.allocated


def of_a_block(how: ComputeConfig) -> tuple[int, int]:
    (few, few_host), (many, many_host) = (bytes_after_forward(how, n) for n in (4, 6))
    return (many - few) // 2, (many_host - few_host) // 2


def assert_a_block_leaves_the_device(share: float | None) -> None:
    keeps, nothing = of_a_block(ComputeConfig("none"))
    left, moved = of_a_block(ComputeConfig("offload", share))
    stays = 0.0 if share is None else share
    assert nothing == 0 and keeps > 100_000
    assert abs(left - stays * keeps) < 0.02 * keeps
    assert (1 - stays) * keeps * 0.98 < moved < 1.25 * (1 - stays) * keeps


@pytest.mark.parametrize("share", [None, 0.5])
def test_a_block_leaves_the_device(share):
    assert_a_block_leaves_the_device(share)


def test_memory_that_is_never_freed_is_caught(monkeypatch):
    monkeypatch.setattr(BlockActivations, "leave", lambda self: None)
    assert_caught(lambda: assert_a_block_leaves_the_device(None))


def test_later_steps_use_the_buffers_of_the_first(monkeypatch):
    """Pinned memory cannot be allocated while a CUDA graph is recorded."""
    takes = []
    take = HostMemory.take

    def noted(self, x):
        before = self.allocated
        buffer = take(self, x)
        takes.append(self.allocated > before)
        return buffer

    monkeypatch.setattr(HostMemory, "take", noted)
    m, layout, host = replace(SMALL, layers=4), Layout(), HostMemory()
    params = tree_map(lambda w: w.requires_grad_(), init(declare_model(m), m.dims(), 0, layout))
    batch = make_batch(torch.zeros(2, m.context + 1, dtype=torch.long), layout)
    for step in range(3):
        takes.clear()
        losses = [
            stage(
                params,
                embed(params, batch, m, layout),
                batch,
                m=m,
                layout=layout,
                how=ComputeConfig("offload"),
                host=host,
            )[0]
            for _ in range(2)
        ]
        assert takes and all(takes) == (step == 0) and any(takes) == (step == 0)
        for loss in losses:
            loss.backward()


def test_copies_are_one_block_ahead(monkeypatch):
    """A block's copies to the host are waited for after the next block. Copies from the host are
    started before the backward of the block after. The last block stays."""
    events: list[str] = []
    numbers: dict[int, int] = {}

    def noted(way):
        copy = getattr(HostMemory, way)

        def run(self, pairs):
            copy(self, pairs)
            number = numbers.setdefault(id(pairs[0][1]), len(numbers))
            events.append(f"{way[5:]} {number}")
            return lambda: events.append(f"{way[5:]} {number} is over")

        return run

    for way in ("copy_out", "copy_in"):
        monkeypatch.setattr(HostMemory, way, noted(way))
    monkeypatch.setattr(HostMemory, "give_back", lambda self, buffer: None)
    run_block = activation_offload.StageActivations.run

    def block(self, call, *args):
        events.append("block")
        return run_block(self, call, *args)

    monkeypatch.setattr(activation_offload.StageActivations, "run", block)
    m, layout = replace(SMALL, layers=4), Layout()
    params = tree_map(lambda w: w.requires_grad_(), init(declare_model(m), m.dims(), 0, layout))
    batch = make_batch(torch.zeros(2, m.context + 1, dtype=torch.long), layout)
    x_TD = embed(params, batch, m, layout)
    loss, _ = stage(params, x_TD, batch, m=m, layout=layout, how=ComputeConfig("offload"))
    forward = ["block", "out 0", "block", "out 1", "out 0 is over", "block", "out 2"]
    assert events == [*forward, "out 1 is over", "block", "out 2 is over"]
    events.clear()
    loss.backward()
    last = ["in 2", "in 2 is over", "in 1", "in 1 is over", "in 0", "in 0 is over"]
    assert events == last


def test_the_share_of_blocks_that_stay():
    for share, stays in ((0.0, []), (0.5, [1, 3, 5]), (0.25, [3]), (1.0, list(range(6)))):
        policy = offload(share)
        assert [i for i in range(6) if policy.block(i) == STAY] == stays
        each = policy.of_stage(6)
        assert each[:-1] == [policy.block(i) for i in range(5)] and each[-1] == STAY
    assert policy_for("offload").block(0).offload_bytes == 0  # as every test of this file
    assert MOVE.offload_bytes == 2**20


@given(st.integers(1, 2**40))
def test_buffers_have_few_sizes(nbytes):
    size = buffer_size(nbytes)
    assert nbytes <= size <= 1.25 * nbytes and size == buffer_size(size)
