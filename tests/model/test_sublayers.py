"""Blocks with one sub-layer: a mixer or a feed-forward layer alone."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.layers.mamba2 import Mamba2Config
from dtron.model import block as module
from dtron.model.activation_bytes import block_bytes
from dtron.model.batch import make_batch
from dtron.model.config import ModelConfig
from dtron.model.flops import flops_per_token, parameter_count
from dtron.model.mtp import MTPConfig
from dtron.model.transformer import Transformer, declare_model, forward
from dtron.model.widths import at_width
from dtron.moe.config import MoEConfig
from dtron.params import init
from dtron.runtime.config import DataConfig, RunConfig
from dtron.testing import assert_caught
from dtron.training.gradients import gradients
from dtron.training.pipeline import one_stage, program
from dtron.training.reports import describe_experts, expert_totals
from dtron.tree import flat, tree_map
from tests.generation.models import M as BASE
from tests.generation.models import assert_cached
from tests.helpers.values import F64, ONE, close
from tests.layers.test_context_parallel import assert_same_step

MAMBA = Mamba2Config(heads=4, head_dim=4, groups=2, state=3, chunk=3)
BOTH = replace(BASE, layers=2, pattern="SA", mamba=MAMBA, norm_position="sandwich")
ALONE = replace(BOTH, layers=4, pattern="S_A_", feed_forwards="_F")


def in_two(p: Transformer) -> Transformer:
    """Split each block into one with its mixer and one with its feed-forward layer."""
    blocks = []
    for b in p.blocks:
        blocks.append(replace(b, norm_2=None, mlp=None, moe=None, post_norm_2=None))
        blocks.append(replace(b, letter="_", norm_1=None, mixer=None, post_norm_1=None))
    return replace(p, blocks=tuple(blocks))


def loss_and_gradients(p: Transformer, m: ModelConfig) -> list[Tensor]:
    batch = make_batch(torch.arange(34).view(2, 17) % 61, ONE)
    weights = [w.detach().requires_grad_() for w in flat(p)]
    fresh = iter(weights)
    loss = forward(tree_map(lambda w: next(fresh), p), batch, m, ONE)
    return [loss, *torch.autograd.grad(loss, weights)]


def test_two_blocks_are_one():
    """A block is its mixer alone, and then its feed-forward layer alone. A feed-forward layer that
    is left out is noticed."""
    p = init(declare_model(BOTH), BOTH.dims(), 0, ONE, F64)
    want = loss_and_gradients(p, BOTH)

    def check() -> None:
        for a, b in zip(want, loss_and_gradients(in_two(p), ALONE), strict=True):
            close(b, a)

    check()
    spec = declare_model(ALONE)
    assert [w.shape for w in flat(spec)] == [w.shape for w in flat(p)]
    with mock.patch.object(module, "mlp", lambda p, x_TD, *others: 0 * x_TD):
        assert_caught(check)


def test_estimates():
    """FLOPs, parameters and activation bytes of two blocks are those of one."""
    assert parameter_count(ALONE) == parameter_count(BOTH)
    assert flops_per_token(ALONE, 32) == flops_per_token(BOTH, 32)
    mesh = MeshShape(tp=2)
    alone = [block_bytes(ALONE, mesh, 64, layer=i).all for i in range(4)]
    both = [block_bytes(BOTH, mesh, 64, layer=i).all for i in range(2)]
    assert min(alone) > 0 and sum(alone) == sum(both)
    assert at_width(ALONE, 2 * ALONE.embed).mamba.heads == 8


EXPERTS = {"feed_forwards": "_FD", "pattern": "A__S", "layers": 5, "moe": MoEConfig(4, 2, 8)}
STEPS = [
    ("cp=2,tp=2", {}, {"zero": 3, "recompute": "selective"}),
    ("dp=2,pp=2,ep=2", EXPERTS | {"mtp": MTPConfig(1)}, {"zero": 2, "recompute": "offload"}),
]


@pytest.mark.parametrize(("mesh", "fields", "choices"), STEPS)
def test_a_step_is_that_of_one_device(mesh, fields, choices):
    shape, model = MeshShape.parse(mesh), replace(ALONE, **fields)
    batch, data = 2 * shape.pp * shape.data, DataConfig(seq_len=16, document_mask=True)
    assert_same_step(
        RunConfig(mesh=mesh, model=model, batch=batch, micro_batch=1, data=data, **choices)
    )


def test_reports_have_the_numbers_of_their_layers():
    m, batch = replace(ALONE, **EXPERTS), make_batch(torch.arange(17)[None] % 61, ONE)
    pipe, p = one_stage(m, 1, ONE), init((declare_model(m),), m.dims(), 0, ONE, F64)
    reports = gradients(program(m, ONE), p, [batch], 16, pipe, 0)[2]
    said = describe_experts(expert_totals(reports, pipe, m.moe), m)
    assert {name.split(".")[1] for name in said} == {"1", "4"}


def test_the_cache_changes_nothing():
    assert_cached(ALONE, [[3, 1], [1, 2]])


REFUSED = [
    ({"feed_forwards": "FX"}, "model.feed_forwards='FX'.*letters F, D, _"),
    ({"feed_forwards": ""}, "model.feed_forwards=''"),
    ({"post_norm_mixers": "AK"}, "post_norm_mixers=AK: the blocks have the mixers"),
    ({"pattern": "A_", "feed_forwards": "F_"}, "block 1 has neither a mixer nor"),
    ({"pattern": "_"}, "no block has a mixer"),
    ({"feed_forwards": "D", "moe": MoEConfig(4)}, "feed_forwards=D: no layer would have experts"),
]


@pytest.mark.parametrize(("fields", "said"), REFUSED)
def test_what_is_refused(fields, said):
    with pytest.raises(UserError, match=said) as error:
        ModelConfig(**fields)
    assert "\n" not in str(error.value)
