"""Pipelines on processes: five steps are those of one device, and the messages and their groups."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch.distributed as dist

from dtron.distributed.mesh_shape import MeshShape
from dtron.mesh import Layout
from dtron.runtime.config import DataConfig, PipelineConfig, RunConfig
from dtron.runtime.fault_tolerance import diagnose
from dtron.tools.verify import on_one_device
from dtron.training.pipeline import Pipeline
from tests.helpers.runs import MODEL, on_pool, simulate, train

FOUR = RunConfig(
    model=replace(MODEL, layers=4), data=DataConfig(seq_len=16), batch=8, steps=4, seed=3
)
CASES = [
    ("pp=2,tp=2", {"pipeline": PipelineConfig("1f1b"), "zero": 0}),
    ("pp=2,dp=2", {"pipeline": PipelineConfig("zb-v"), "zero": 3}),
    (
        "pp=2,dp=2",
        {
            "pipeline": PipelineConfig("interleaved"),
            "zero": 2,
            "model": replace(FOUR.model, tied=True),
        },
    ),
    ("pp=4", {"pipeline": PipelineConfig("zb-h1")}),
    ("pp=4", {"pipeline": PipelineConfig("gpipe"), "model": replace(FOUR.model, tied=True)}),
    (
        "pp=2,dp=2",
        {"pipeline": PipelineConfig("dualpipe-v"), "recompute": "full", "micro_batch": 1},
    ),
]


def one_device(changes: dict) -> tuple[list[float], list[float]]:
    history = train(Layout(), MeshShape(), on_one_device(replace(FOUR, **changes)))
    return history.losses, history.norms


@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        (mesh, {**changes, "model": replace(FOUR.model, layers=n)})
        for (mesh, changes), n in zip(CASES, (2, 4))
    ],
)
def test_three_steps_on_simulated_ranks(mesh, changes):
    """The third loss is the first that depends on both moments of Adam. Every stage has a layer."""
    changes = {**changes, "steps": 3}
    losses, norms = one_device(changes)
    got = simulate(mesh, replace(FOUR, **changes))
    assert got.losses == pytest.approx(losses, rel=1e-5)
    assert got.norms == pytest.approx(norms, rel=1e-4)


@pytest.mark.xdist_group("pool")
@pytest.mark.parametrize(("mesh", "changes"), CASES)
def test_four_steps_on_real_ranks(pool, mesh, changes):
    losses, norms = one_device(changes)
    for got, got_norms, _ in pool.run(on_pool, mesh, replace(FOUR, **changes)):
        assert got == pytest.approx(losses, rel=1e-5) and losses[-1] < losses[0] - 0.1
        assert got_norms == pytest.approx(norms, rel=1e-4)


def sends_on_pool(mesh: str, config: RunConfig) -> int:
    """A job for the pool: the number of messages from this rank to another in one step."""
    isend, count = dist.isend, 0

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return isend(*args, **kwargs)

    dist.isend = counted
    try:
        on_pool(mesh, config)
    finally:
        dist.isend = isend
    return count


@pytest.mark.xdist_group("pool")
@pytest.mark.parametrize("tied", [False, True])
def test_ranks_send_what_the_table_needs_and_nothing_else(pool, tied):
    """Per microbatch and boundary, one activation and one gradient. Once a step, the gradient of a
    tied weight in both directions. In the V of ZB-V the last rank turns without a message, and rank
    0 has both copies."""
    config = replace(
        FOUR, model=replace(FOUR.model, layers=8, tied=tied), micro_batch=1, batch=5, steps=1
    )
    once = 1 if tied else 0
    assert pool.run(sends_on_pool, "pp=4", config) == [5 + once, 10, 10, 5 + once]
    assert pool.run(sends_on_pool, "pp=4", replace(config, pipeline=PipelineConfig("zb-v"))) == [
        10,
        20,
        20,
        10,
    ]


def by_host_on_pool(
    mesh: str, config: RunConfig, change_step=lambda step: step
) -> tuple[list[float], list[str]]:
    """A job for the pool: the losses of a run whose ranks also have a group over their hosts, as on
    GPUs, and the group of each message.

    ``change_step`` wraps the step."""
    isend, went, hosts = dist.isend, [], []

    def with_host(pipe: Pipeline) -> Pipeline:
        hosts.append(pipe.groups.line)  # here it needs no GPU either
        return replace(pipe, groups=replace(pipe.groups, host=pipe.groups.line))

    def noted(*args, group, **kwargs):
        went.append("host" if group is hosts[0] else "way")
        return isend(*args, group=group, **kwargs)

    dist.isend = noted
    try:
        return on_pool(mesh, config, change=with_host, change_step=change_step)[0], went
    finally:
        dist.isend = isend


@pytest.mark.xdist_group("pool")
@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("interleaved", marks=pytest.mark.slow)])
def test_the_first_step_sends_by_way_of_the_hosts(pool, schedule):
    """The first step loads GPU functions. The load may wait for a GPU that waits for a message, so
    messages go over the hosts. Later steps load nothing. The gradients of tied weights never go
    over the hosts, because all messages have arrived before."""
    m = replace(FOUR.model, layers=8, tied=True)
    config = replace(
        FOUR, model=m, micro_batch=1, batch=5, steps=3, pipeline=PipelineConfig(schedule)
    )
    losses, _ = one_device({"model": m, "micro_batch": 1, "batch": 5, "steps": 3})
    each = {"1f1b": [5, 10, 10, 5], "interleaved": [15, 20, 20, 15]}[schedule]
    for rank, (got, went) in enumerate(pool.run(by_host_on_pool, "pp=4", config)):
        once = ["way"] * (rank in (0, 3))
        assert went == ["host"] * each[rank] + once + 2 * (["way"] * each[rank] + once)
        assert got == pytest.approx(losses, rel=1e-5)


def diagnosed(step):
    """A step with a diagnosis before it."""

    def run(params, opt, batches, *rest):
        assert "are finite" in diagnose(step, params, batches)
        return step(params, opt, batches, *rest)

    return run


@pytest.mark.xdist_group("pool")
def test_a_diagnosis_sends_by_way_of_the_hosts_whatever_was_sent_before(pool):
    """The diagnosis loads functions that no step has run. It does not count as the first step.
    Later steps use their usual groups."""
    config = replace(FOUR, micro_batch=1, batch=5, steps=3)
    losses, _ = one_device({"micro_batch": 1, "batch": 5, "steps": 3})
    for each, (got, went) in zip(
        [5, 10, 10, 5], pool.run(by_host_on_pool, "pp=4", config, diagnosed)
    ):
        by_turns = ["host", "host", "host", "way", "host", "way"]  # a diagnosis, a step, ...
        assert went == [way for way in by_turns for _ in range(each)]
        assert got == pytest.approx(losses, rel=1e-5)


def tried_on_pool(mesh: str, config: RunConfig) -> list[tuple[str, int]]:
    """A job for the pool: the messages that try this rank's links, and the other rank of each."""
    send, recv, tried = dist.send, dist.recv, []

    def noted(kind, fn):
        return lambda x, other, **kwargs: (tried.append((kind, other)), fn(x, other, **kwargs))[1]

    dist.send, dist.recv = noted("to", send), noted("from", recv)
    try:
        on_pool(mesh, config)
    finally:
        dist.send, dist.recv = send, recv
    return tried


@pytest.mark.xdist_group("pool")
@pytest.mark.parametrize("tied", [False, True])
def test_each_way_is_tried_once_in_one_order(pool, tied):
    """At the start every link carries one message: down and up between neighbours, and between both
    copies of a tied weight. All ranks use the same order of links."""
    config = replace(FOUR, model=replace(FOUR.model, tied=tied), micro_batch=1, batch=4, steps=1)
    ends = [(0, 3), (3, 0)] if tied else []
    ways = sorted([(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2), *ends])
    for rank, tried in enumerate(pool.run(tried_on_pool, "pp=4", config)):
        assert tried == [("to", b) if rank == a else ("from", a) for a, b in ways if rank in (a, b)]
