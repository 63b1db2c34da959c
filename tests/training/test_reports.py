"""The numbers beside the loss: each is a mean over its own targets, and cross entropy is alone."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full
from dtron.distributed.simulated_ranks import simulated
from dtron.layers.cross_entropy import IGNORE
from dtron.losses.objective import CROSS_ENTROPY
from dtron.mesh import Layout
from dtron.model import transformer
from dtron.model.batch import make_batch, valid_tokens
from dtron.model.head import loss_options
from dtron.model.mtp import MTPConfig
from dtron.params import init
from dtron.rules import rules_for
from dtron.runtime.config import ModelConfig
from dtron.testing import assert_caught
from dtron.training.gradients import gradients
from dtron.training.pipeline import one_stage, program
from dtron.training.reports import StepReports, describe_extras, loss_stats, mtp_losses
from tests.helpers.runs import MODEL

# Each row has 14 targets. The last ones do not count, so a module that looks further has few left.
ROWS = torch.arange(4 * 15).view(4, 15) % 61
ROWS[:, 8:] = IGNORE
LOSS = math.log(MODEL.vocab)  # of a model that knows nothing


def numbers(model: ModelConfig, mesh: str = "") -> dict[str, float]:
    """Cross entropy of one step, and the numbers beside it, two microbatches."""
    with simulated(MeshShape.parse(mesh or "dp=1")) as devices:
        layout = Layout(devices, rules_for(1))
        pipe, functions = one_stage(model, 2, layout), program(model, layout)
        params = init(pipe.spec, model.dims(), 0, layout, torch.float64)
        batches = [make_batch(rows, layout, depth=model.mtp.depth) for rows in ROWS.chunk(2)]
        valid = valid_tokens(ROWS)
        loss, _, reports = gradients(functions, params, batches, valid, pipe, 1)
        names = CROSS_ENTROPY.stats(loss_options(model))
        extras = StepReports(
            None,
            mtp_losses(reports, pipe, model.mtp.depth),
            loss_stats(reports, pipe, names),
        )
        return {"loss": full(loss).item()} | describe_extras(extras, names, valid)


AHEAD = replace(MODEL, layers=1, mtp=MTPConfig(3))


def each_is_that_of_a_model_that_knows_nothing(mesh: str = "") -> None:
    assert list(found := numbers(AHEAD, mesh)) == ["loss", "mtp.1.loss", "mtp.2.loss", "mtp.3.loss"]
    for name, value in found.items():
        assert value == pytest.approx(LOSS, rel=0.02), name


@pytest.mark.parametrize("mesh", ["", "dp=2", "tp=4"])
def test_a_module_has_the_mean_of_its_own_targets(mesh):
    """Known bug: the sum was divided by the number of the model's targets."""
    each_is_that_of_a_model_that_knows_nothing(mesh)


def test_the_count_of_other_targets_is_caught():
    every = lambda targets_T: torch.tensor(float(targets_T.numel()))
    with mock.patch.object(transformer, "_count_targets", every):
        assert_caught(each_is_that_of_a_model_that_knows_nothing)


def test_a_module_without_targets_has_no_loss():
    deep = numbers(replace(AHEAD, mtp=MTPConfig(8)))
    assert math.isnan(deep["mtp.8.loss"]) and deep["mtp.6.loss"] == pytest.approx(LOSS, rel=0.02)


@pytest.mark.parametrize("mesh", ["", "dp=2,tp=2"])
def test_z_loss_stands_beside_the_loss(mesh):
    """Known bug: the loss that was printed had z-loss in it, and the validation loss had not."""
    plain, with_z = (numbers(replace(MODEL, z_loss=z), mesh) for z in (0.0, 0.01))
    assert plain == {"loss": with_z["loss"]}
    assert with_z["z_loss"] == pytest.approx(LOSS**2, rel=0.02)
