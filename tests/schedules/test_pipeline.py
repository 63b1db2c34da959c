"""Any schedule, any number of layers a stage, any mesh: the result of one device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import simulated
from dtron.mesh import Layout
from dtron.model.batch import make_batch, valid_tokens
from dtron.model.stages import split_into_stages
from dtron.params import init
from dtron.rules import rules_for
from dtron.runtime.config import DataConfig, PipelineConfig, RunConfig
from dtron.schedules import SCHEDULES, make, stages_of_rank
from dtron.schedules.p2p import InProcessLinks
from dtron.testing import assert_caught
from dtron.tools.compare_steps import StepResult
from dtron.tools.verify import on_one_device
from dtron.tools.verify_step import one_step
from dtron.training.compiled_stage import compiled
from dtron.training.grad_norm import global_norm
from dtron.training.gradients import gradients
from dtron.training.pipeline import Pipeline, one_stage, pipeline, program
from tests.helpers.examples import examples, seen
from tests.helpers.runs import MODEL
from tests.helpers.same_step import assert_same_result, model_config


def assert_same_step(config: RunConfig, step=one_step) -> StepResult:
    got = step(config, MeshShape.parse(config.mesh))
    assert_same_result(one_step(on_one_device(config), MeshShape()), got)
    return got


MOST = examples(32)  # stages times microbatches times ranks of an example
STAGE_MESHES = ["", ",dp=2", ",tp=2", ",dp=3", ",dp=2,tp=2", ",dp_replicate=2,dp=2"]


@settings(max_examples=examples(1, thorough=30))
@seen(  # every schedule on four or more stages of one device, and on stages of one mesh
    schedule=list(SCHEDULES),
    pp=[4] * 6 + [2] * 6,
    more=[5] * 6 + [1] * 6,
    inner=[""] * 6 + [",dp=3", ",dp_replicate=2,dp=2", ",tp=2", ",dp=2,tp=2", ",dp=2", ",dp=2"],
    stages_per_rank=[2, 3, 2],
    extra=[1] * 6 + [0] * 6,
    zero=[1, 3, 0, 2, 3],
    tied=[True, False, False],
    each=[False, True],
    recompute=["none", "none", "full", "selective"],
    seed=[0],
)
@given(
    schedule=st.sampled_from(list(SCHEDULES)),
    pp=st.sampled_from([2, 2, 4]),
    inner=st.sampled_from(STAGE_MESHES),
    stages_per_rank=st.integers(1, 3),
    more=st.integers(0, 13),
    extra=st.integers(0, 2),
    zero=st.sampled_from([0, 1, 2, 3]),
    tied=st.booleans(),
    each=st.booleans(),
    recompute=st.sampled_from(["none", "none", "selective", "full"]),
    seed=st.integers(0, 99),
)
def test_one_step_is_that_of_one_device(
    schedule, pp, inner, stages_per_rank, more, extra, zero, tied, each, recompute, seed
):
    """Microbatches from pp (for DualPipe-V 2 pp) to 4 pp + 1; one to three stages on a rank."""
    shape = MeshShape.parse(f"pp={pp}{inner}")
    stages = pp * stages_of_rank(schedule, stages_per_rank)
    count = min(max(pp + more, 2 * pp if schedule == "dualpipe-v" else 0), 4 * pp + 1)
    assume(stages * count * shape.size // pp <= MOST or not inner)  # seconds
    config = model_config(
        str(shape),
        1,
        zero=zero,
        batch=count * shape.data,
        micro_batch=1,
        layers=stages + extra,
        tied=tied,
        recompute=recompute,
        seed=seed,
        bias=True,
        zero3_gather="microbatch" if each else "step",
        pipeline=PipelineConfig(schedule, stages_per_rank),
    )
    assert_same_step(config)


def broken(change):
    """A step on a pipeline whose links are broken by ``change(links)``."""

    def step(config, shape):
        links = Pipeline.links
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                Pipeline, "links", lambda self, *args, **named: change(links(self, *args, **named))
            )
            return one_step(config, shape)

    return step


class Mixed(InProcessLinks):
    """Mutant: every microbatch gets the gradient of the first."""

    def __init__(self):
        super().__init__()
        self._kept = {}

    def receive(self, made):
        if made.kind != "F" and made.microbatch and made._replace(microbatch=0) in self._kept:
            super().receive(made)
            return self._kept[made._replace(microbatch=0)]
        self._kept[made] = super().receive(made)
        return self._kept[made]


class Halved(InProcessLinks):
    def send(self, made, x):
        super().send(made, x / 2 if made.kind != "F" else x)


@pytest.mark.parametrize("links", [Mixed, Halved])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_broken_links_are_caught(links, schedule):
    config = model_config(
        "pp=2", 1, zero=1, batch=5, micro_batch=1, layers=4, pipeline=PipelineConfig(schedule)
    )
    assert_same_step(config)
    assert_caught(lambda: assert_same_step(config, broken(lambda _: links())))


def test_twins_that_are_not_added_up_are_caught(monkeypatch):
    config = model_config("pp=2", 1, zero=1, batch=4, micro_batch=1, layers=2, tied=True)
    monkeypatch.setattr(Pipeline, "reduce_tied_embedding", lambda self, grads: grads)
    assert_caught(lambda: assert_same_step(config))


def test_a_twin_is_counted_once_in_the_norm():
    config = model_config("pp=2", 1, zero=1, batch=4, micro_batch=1, layers=2, tied=True)
    got = one_step(config, MeshShape(pp=2)).norm
    assert got == pytest.approx(one_step(on_one_device(config), MeshShape()).norm, rel=1e-12)


# ---- functions and weights


def test_a_compiled_stage_gives_the_same():
    """Two stages in one process share their kinds of blocks."""
    m, count = replace(MODEL, layers=2), 4
    rows = torch.arange(4 * 17).view(4, 17) % 61
    batches = [make_batch(r, Layout()) for r in rows.chunk(count)]
    found = []
    for compiles in (False, True):
        t = make("1f1b", 2, count)
        pipe = Pipeline(t, tuple(split_into_stages(m, [1, 1])), Layout())
        params = init(pipe.spec, m.dims(), 0, Layout(), torch.float64)
        functions = program(m, Layout())
        if compiles:
            functions = compiled(functions, Layout(), backend="aot_eager")
        loss, grads, _ = gradients(functions, params, batches, valid_tokens(rows), pipe, 1)
        found.append((loss.item(), global_norm(grads, pipe.spec).item()))
    assert found[1] == pytest.approx(found[0], rel=1e-12)


def test_zero_3_gathers_once_a_step_unless_asked():
    counts = {}
    for gather in ("step", "microbatch"):
        for micro in (2, 3):
            config = model_config(
                "pp=2,dp=2",
                1,
                zero=3,
                batch=2 * micro,
                micro_batch=1,
                layers=2,
                zero3_gather=gather,
            )
            done = one_step(config, MeshShape(pp=2, dp=2)).collectives.count
            counts[gather, micro] = sum(n for c, n in done.items() if c.kind == "all_gather")
    assert (
        counts["step", 2] == counts["step", 3] < counts["microbatch", 2] < counts["microbatch", 3]
    )


def test_one_stage_is_a_pipeline():
    with simulated(MeshShape(dp=2)) as mesh:
        layout = Layout(mesh, rules_for(1))
        pipe = one_stage(MODEL, 3, layout)
        assert pipe.stages == [0] and len(pipe.spec) == 1
        config = RunConfig(
            model=MODEL, data=DataConfig(seq_len=16), mesh="dp=2", batch=6, micro_batch=1
        )
        assert (
            pipeline(config, MeshShape(dp=2), 3, config.data.seq_len, layout).table.rows
            == pipe.table.rows
        )
