"""Losses in compiled steps of real processes: the same as on one device."""

import pytest
import torch

from dtron.distributed.mesh_shape import MeshShape
from dtron.losses.config import LossConfig
from dtron.tools.verify import on_one_device
from dtron.tools.verify_processes import step_of_processes
from dtron.tools.verify_step import one_step
from tests.helpers.same_step import assert_same_result
from tests.losses.runs import run_of


@pytest.mark.parametrize(
    ("mesh", "loss", "backend"),
    [
        ("cp=2", LossConfig(name="dpo"), "aot_eager"),
        ("pp=2", LossConfig(name="distillation", temperature=2.0), "aot_eager"),
        pytest.param("dp=2", LossConfig(name="dpo"), "inductor", marks=pytest.mark.slow),
        pytest.param(
            "tp=2", LossConfig(name="distillation", top_k=3), "inductor", marks=pytest.mark.slow
        ),
    ],
)
def test_a_compiled_step_of_processes_is_that_of_one_device(mesh, loss, backend):
    config = run_of(loss, mesh, zero=3)
    want = one_step(on_one_device(config), MeshShape())
    got = step_of_processes(config, MeshShape.parse(mesh), want, torch.float64, backend=backend)
    assert_same_result(want, got)
