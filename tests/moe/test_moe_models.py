"""Models with experts: one optimizer step on any mesh is the step of one device. Auxiliary losses
and router biases are right."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dtron.training.gradients
import dtron.training.pipeline
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import to_local as local_part
from dtron.distributed.simulated_ranks import one_rank
from dtron.model import kept_operators
from dtron.model.batch import make_batch
from dtron.model.compute_config import ComputeConfig
from dtron.moe import router
from dtron.moe.config import MoEConfig
from dtron.params import init
from dtron.runtime.config import DataConfig, ModelConfig, PipelineConfig, RunConfig
from dtron.schedules.runner import StageOutput
from dtron.testing import assert_caught, zero_stages
from dtron.tools.verify import on_one_device
from dtron.tools.verify_step import one_step
from dtron.training.gradients import gradients
from dtron.training.pipeline import one_stage, program
from dtron.tree import flat
from tests.helpers.experts import ONE, expert_meshes
from tests.helpers.same_step import assert_same_result


def model_config(mesh: str, pp: int = 1, **choices) -> RunConfig:
    shape = MeshShape.parse(mesh)
    run = {k: choices.pop(k) for k in list(choices) if k in RunConfig.__dataclass_fields__}
    each, layers = choices.pop("each", 2), choices.pop("layers", 1)
    experts = shape.ep * each
    c = MoEConfig(experts, min(choices.pop("top_k", 2), experts), 4 * shape.etp, **choices)
    model = ModelConfig(
        vocab=29,
        embed=10,
        layers=layers,
        heads=2 * shape.tp,
        kv_heads=shape.tp,
        head_dim=4,
        mlp=4 * shape.tp,
        vocab_multiple=1,
        context=24,
        moe=c,
    )
    run = {"batch": 2 * shape.data, "micro_batch": 1} | run
    return RunConfig(mesh=mesh, model=model, data=DataConfig(seq_len=12), **run)


def assert_step(config: RunConfig, mutate=lambda layout: layout) -> None:
    want = one_step(replace(on_one_device(config), recompute="none"), MeshShape())
    assert_same_result(want, one_step(config, MeshShape.parse(config.mesh), mutate))


EVERYTHING = {"aux_loss": 0.1, "z_loss": 0.05, "bias_rate": 1e-2, "router_bias": True}


@settings(max_examples=20)
@given(
    mesh=expert_meshes(ranks=6, axes=("dp_replicate", "dp", "tp")),
    zero=zero_stages(),
    each=st.sampled_from([1, 3]),
    pp=st.sampled_from([1, 1, 2]),
    top_k=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
    aux_level=st.sampled_from(["micro_batch", "sequence", "global_batch"]),
    recompute=st.sampled_from(["none", "selective", "full"]),
    dense_layers=st.sampled_from([0, 1]),
    moe_dispatch=st.sampled_from(["auto", "static", "allgather"]),
    schedule=st.sampled_from(["1f1b", "interleaved", "zb-h1"]),
)
@pytest.mark.slow
def test_one_step_on_any_mesh(mesh, pp, schedule, **choices):
    mesh, layers = f"pp={pp},{mesh}" if pp > 1 else mesh, 4 if pp > 1 else 2
    if pp > 1:
        choices["pipeline"] = PipelineConfig(schedule)
    count = 4 if pp > 1 else 2
    data = MeshShape.parse(mesh).data
    assert_step(model_config(mesh, layers=layers, batch=count * data, **EVERYTHING, **choices))


STEPS = [
    ("dp=2,ep=2", {"zero": 0, "aux_level": "global_batch", "recompute": "full"}),
    ("dp=2,tp=2,ep=4", {"zero": 1, "shared": 4, "shared_gate": True, "each": 1, "top_k": 1}),
    (
        "dp=4,ep=2",
        {"zero": 3, "aux_level": "sequence", "moe_dispatch": "allgather", "recompute": "selective"},
    ),
    ("dp_replicate=2,dp=2,ep=2", {"zero": 2, "moe_dispatch": "static"}),
    ("dp=2,tp=2,ep=2,etp=2", {"zero": 3, "score": "sigmoid", "groups": 2, "bias": True}),
    ("pp=2,dp=2,ep=2", {"zero": 1, "layers": 3, "dense_layers": 1, "aux_level": "global_batch"}),
    ("pp=2,tp=2,ep=2", {"zero": 2, "layers": 2, "pipeline": PipelineConfig("zb-h1"), "batch": 4}),
]


@pytest.mark.parametrize(("mesh", "choices"), STEPS)
def test_one_step(mesh, choices):
    """Loss, gradients, weights and router biases."""
    assert_step(model_config(mesh, **EVERYTHING, **choices))


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule", ["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "dualpipe-v"]
)
def test_every_schedule(schedule):
    config = model_config(
        "pp=2,dp=2,ep=2",
        layers=4,
        batch=8,
        aux_level="global_batch",
        pipeline=PipelineConfig(schedule, stages_per_rank=2),
        **EVERYTHING,
    )
    assert_step(config)


def on_the_mesh(change):
    """The stage function, changed on meshes only."""
    stage = dtron.training.pipeline.stage

    def changed(*args, layout, **named):
        y, extra = stage(*args, layout=layout, **named)
        return (y, extra) if layout.mesh is None else (y, change(extra))

    return changed


def test_an_auxiliary_loss_that_never_reaches_backward_is_caught(monkeypatch):
    """Known bug elsewhere."""
    config = model_config("dp=2,ep=2", aux_loss=0.1)
    assert_step(config)
    lost = on_the_mesh(lambda extra: StageOutput(None, extra.report))
    monkeypatch.setattr(dtron.training.pipeline, "stage", lost)
    assert_caught(lambda: assert_step(config))


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_an_auxiliary_loss_that_is_scaled_is_caught(monkeypatch, factor):
    config = model_config("dp=2,ep=2", aux_loss=0.1)
    monkeypatch.setattr(
        dtron.training.pipeline,
        "stage",
        on_the_mesh(lambda e: StageOutput(factor * e.aux, e.report)),
    )
    assert_caught(lambda: assert_step(config))


def test_a_balance_bias_that_counts_one_rank_is_caught(monkeypatch):
    config = model_config("dp=4,ep=2", bias_rate=1e-2, each=3, batch=4)
    assert_step(config)
    summed = dtron.training.gradients._summed

    def of_one_rank(report, layout):
        return summed({name: one_rank(local_part(x)) for name, x in report.items()}, ONE)

    monkeypatch.setattr(dtron.training.gradients, "_summed", of_one_rank)
    assert_caught(lambda: assert_step(config))


def test_a_balance_bias_moves_by_the_sign_of_what_is_missing():
    config = model_config("dp=1", bias_rate=0.25, each=4, batch=2)
    step = one_step(config, MeshShape())
    (layer,) = [p.moe for p in step.params.blocks]
    moved = layer.router.balance
    assert set(moved.tolist()) <= {-0.25, 0.0, 0.25} and moved.min() < 0 < moved.max()
    assert (step.grads.blocks[0].moe.router.balance == 0).all()  # and nothing else moves it


def test_what_is_minimised_and_what_is_reported():
    """Auxiliary losses have gradients. The reported loss is the main loss."""
    config = model_config("dp=1", aux_loss=0.5, z_loss=0.1, each=4, batch=2, micro_batch=2)
    off = replace(config.model.moe, aux_loss=0.0, z_loss=0.0)
    without = replace(config, model=replace(config.model, moe=off))
    both, plain = (one_step(c, MeshShape()) for c in (config, without))
    assert both.loss == plain.loss
    w = lambda step: step.grads.blocks[0].moe.router.w
    assert (w(both) - w(plain)).abs().max() > 1e-3


# ---- the choice of experts is not recomputed


def gradients_with_choices(recompute: str, factor: float) -> list[torch.Tensor]:
    """The gradients of one block. From the second run of the router on, scores have ``factor``."""
    m = replace(model_config("dp=1", each=4).model, init_std=0.3)
    how = ComputeConfig(recompute, moe_dispatch="static")  # no shape depends on the choice
    functions = program(m, ONE, how, splits=False)
    pipe, runs = one_stage(m, 1, ONE), count()
    params = init(pipe.spec, m.dims(), 0, ONE, torch.float64)
    choose = router.choose

    def other(scores_TE: torch.Tensor, *rest) -> torch.Tensor:
        return choose(scores_TE * (factor if next(runs) else 1.0), *rest)

    rows = torch.arange(2 * 13).view(2, 13)
    with mock.patch.object(router, "choose", other):
        grads = gradients(functions, params, [make_batch(rows, ONE)], 24, pipe, 1)[1]
    assert next(runs) == (1 if recompute == "none" else 2)
    return flat(grads)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_choice_is_not_made_again(recompute):
    """Known bug of other trainers: a score that is rounded differently in backward gives a token
    another expert there, without any error."""
    want, got = (gradients_with_choices(recompute, factor) for factor in (1.0, -1.0))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_a_choice_that_is_made_again_is_caught():
    with mock.patch.object(kept_operators, "_CHOICES", ("none of these",)):
        want, got = (gradients_with_choices("full", factor) for factor in (1.0, -1.0))
    assert not all(torch.allclose(a, b) for a, b in zip(want, got, strict=True))
