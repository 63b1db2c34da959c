"""Losses in compiled steps of real processes: the same as on one device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full
from dtron.losses.config import LossConfig
from dtron.mesh import Layout, stage_mesh
from dtron.rules import rules_for
from dtron.runtime.config import RunConfig
from dtron.tools.verify import on_one_device
from dtron.tools.verify_processes import step_of_processes
from dtron.tools.verify_step import one_step, plan_of, second_model, step_inputs
from dtron.training.build import build_step
from dtron.training.pipeline import on_ranks, pipeline
from dtron.tree import leaves, with_specs
from tests.helpers.real_mesh import destroy_groups, real_mesh
from tests.helpers.same_step import assert_same_result
from tests.losses.runs import run_of

DPO = LossConfig(name="dpo")


def gradients_on_pool(config: RunConfig) -> dict[str, Tensor]:
    """A job for the pool: the gradients of this rank's stages, of a compiled step."""
    torch.compiler.reset()
    shape, mesh = MeshShape.parse(config.mesh), real_mesh(config.mesh)
    plan = replace(plan_of(config, shape, torch.float64), compile=True)
    layout = Layout(stage_mesh(mesh), rules_for(config.zero))
    template = torch.empty(0, config.model.embed, dtype=torch.float64)
    stages = pipeline(config, shape, plan.count, config.data.seq_len, layout)
    pipe = on_ranks(stages, mesh, template)
    second = second_model(config, pipe, plan)
    step = build_step(config, plan, pipe, "aot_eager", reference=second)
    params, batches, _ = step_inputs(config, pipe, plan.count, torch.float64)
    _, grads, _ = step.gradients(params, batches)
    found = {w.path: full(g).clone() for w, g in with_specs(pipe.spec, grads)}
    destroy_groups(pipe)
    return found


@pytest.mark.xdist_group("pool")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("mesh", "loss"), [("cp=2", DPO), ("pp=2", LossConfig(name="distillation", top_k=3))]
)
def test_a_compiled_step_of_a_pool_is_that_of_one_device(pair, mesh, loss):
    config = run_of(loss, mesh, zero=3)
    want = dict(leaves(one_step(on_one_device(config), MeshShape()).grads))
    found: dict[str, Tensor] = {}
    for part in pair.run(gradients_on_pool, config):
        found |= part
    assert found.keys() == want.keys()
    for path, g in want.items():
        torch.testing.assert_close(found[path], g, rtol=1e-9, atol=1e-9, msg=path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "loss"), [("dp=2", DPO), ("tp=2", LossConfig(name="distillation", top_k=3))]
)
def test_a_step_of_inductor_is_that_of_one_device(mesh, loss):
    config = run_of(loss, mesh, zero=3)
    want = one_step(on_one_device(config), MeshShape())
    got = step_of_processes(config, MeshShape.parse(mesh), want, torch.float64)
    assert_same_result(want, got)
