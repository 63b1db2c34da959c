"""The optimizer, the learning rate, the initial weights and the counts, each against an independent
definition."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dtron.distributed.mesh_shape import MeshShape
from dtron.model.flops import flops_per_token, parameter_count
from dtron.model.transformer import declare_model
from dtron.params import init
from dtron.runtime.config import ModelConfig, OptimConfig
from dtron.tools import verify
from dtron.training.elementwise_optimizer import update_weight
from dtron.training.grad_norm import clip_scale, global_norm
from dtron.training.lr_schedule import Progress, learning_rate
from dtron.training.optim_config import build_optimizer
from dtron.training.optimizer import apply_update, init_state, with_compute_copies
from dtron.training.update_scalars import UpdateScalars
from dtron.tree import flat, leaves, tree_map
from tests.helpers.same_step import assert_same_result, model_config
from tests.helpers.values import ADAMW, ONE, SMALL, assert_steps_of_torch, close, normal


def test_adam_is_torch_adamw():
    adamw = build_optimizer(OptimConfig(beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.3))
    model = replace(SMALL, qk_norm=True, qkv_bias=True, bias=True, norm="layernorm")
    assert_steps_of_torch(adamw, model, torch.optim.AdamW, betas=(0.8, 0.9), eps=1e-3)


@pytest.mark.parametrize("kernel", [None, update_weight])
def test_copies_are_the_masters_in_fewer_bits(kernel):
    """After every step the copies are the masters, rounded. The third step is skipped and moves
    nothing. Without copies the weights are the same."""
    spec, adamw = declare_model(SMALL), replace(ADAMW, kernel=kernel)
    found = []
    for dtype in (None, torch.bfloat16):
        params = init(spec, SMALL.dims(), 0, ONE)
        state = with_compute_copies(init_state(adamw, spec, params), params, spec, dtype)
        for step in range(4):
            grads = tree_map(
                lambda w, step=step: normal(*w.shape, seed=step).float().detach(), params
            )
            ok = torch.tensor(step != 2)
            before = [w.clone() for w in flat(params)]
            scalars = UpdateScalars(0.1, 0.7, ok)
            params, state = apply_update(adamw, spec, params, grads, state, scalars, ONE)
            assert all(a.equal(b) != (step != 2) for a, b in zip(flat(params), before, strict=True))
            if dtype is not None:
                of = zip(flat(state.compute_copies), flat(params), strict=True)
                assert all(c.dtype == dtype and c.equal(p.to(dtype)) for c, p in of)
        found.append(flat((params, *state.trees.values())))
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("beta", ["beta1", "beta2"])
def test_betas_are_under_one(beta):
    """With beta = 1 the bias correction divides 0 by 0: every weight would be NaN after one
    step."""
    with pytest.raises(ValueError, match=f"{beta}=1.0"):
        OptimConfig(**{beta: 1.0})


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping_is_that_of_torch(limit):
    grads = (normal(3, 4).detach(), (normal(5).detach(), None))
    theirs = [g.clone() for g in flat(grads)]
    for w in theirs:
        w.grad = w.clone()
    norm = global_norm(grads)
    assert norm.item() == pytest.approx(
        torch.nn.utils.clip_grad_norm_(theirs, limit).item(), rel=1e-14
    )
    close(
        [g * clip_scale(norm, limit) for g in flat(grads)], [w.grad for w in theirs], 1e-5
    )  # torch: + 1e-6
    cases = {(5, 0): 1, (0, 1): 1, (0.5, 1): 1, (1, 1): 1, (4, 1): 0.25}  # (norm, limit): scale
    assert {
        (n, limit): clip_scale(torch.tensor(float(n)), limit).item() for n, limit in cases
    } == cases


@given(
    schedule=st.sampled_from(["constant", "linear", "cosine", "wsd"]),
    warmup=st.integers(0, 20),
    rest=st.integers(2, 50),
    min_lr_ratio=st.floats(0, 1),
    wsd_decay_ratio=st.floats(0.01, 1),
)
def test_learning_rate(schedule, warmup, rest, min_lr_ratio, wsd_decay_ratio):
    config = OptimConfig(
        lr=3.0,
        schedule=schedule,
        warmup=warmup,
        min_lr_ratio=min_lr_ratio,
        wsd_decay_ratio=wsd_decay_ratio,
    )
    rates = [
        learning_rate(config, Progress(step, 1, warmup, warmup + rest - 1))
        for step in range(warmup + rest)
    ]
    assert rates[: warmup + 1] == pytest.approx(
        [3.0 * (i + 1) / warmup for i in range(warmup)] + [3.0]
    )
    assert rates[-1] == pytest.approx(3.0 if schedule == "constant" else 3.0 * min_lr_ratio)
    assert all(a >= b * (1 - 1e-12) for a, b in pairwise(rates[warmup:]))


def test_the_shapes_of_schedules():
    config = OptimConfig(lr=1, warmup=0, min_lr_ratio=0.2, wsd_decay_ratio=0.5)
    rates = lambda name: [
        learning_rate(replace(config, schedule=name), Progress(s, 1, 0, 4)) for s in range(5)
    ]
    assert rates("constant") == [1] * 5
    assert rates("linear") == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert rates("cosine") == pytest.approx(
        [0.6 + 0.4 * c for c in (1, 0.5**0.5, 0, -(0.5**0.5), -1)]
    )
    assert rates("wsd") == pytest.approx([1, 1, 1, 0.6, 0.2])


def weights(model: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    return dict(leaves(init(declare_model(model), model.dims(), seed, ONE)))


def test_a_weight_depends_on_seed_and_path_only():
    small, deep, other = weights(SMALL), weights(replace(SMALL, layers=8)), weights(SMALL, seed=1)
    for path, w in small.items():
        # With four times the layers, weights that write to the residual stream are halved.
        assert w.equal(deep[path] * (2 if path.endswith(("w_o", "w_down")) else 1)), path
    drawn = [path for path in small if "w_" in path]
    assert len({w[path].flatten()[0].item() for w in (small, other) for path in drawn}) == 2 * len(
        drawn
    )


def test_initial_values():
    model = replace(
        SMALL, embed=256, mlp=512, norm="layernorm", bias=True, qkv_bias=True, init_std=0.05
    )
    for path, w in weights(model).items():
        name = path.rpartition(".")[2]
        if "w_" in name:
            std = 0.05 / math.sqrt(2 * 2) if name in ("w_o", "w_down") else 0.05
            assert w.std().item() == pytest.approx(std, rel=0.05), path
            assert abs(w.mean().item()) < 5 * std / math.sqrt(w.numel()), path
        else:
            assert (w == (1 if name == "scale" else 0)).all(), path


def test_parameter_count():
    block = 2 * 256 * 8 * 32 + 2 * 256 * 4 * 32 + 3 * 256 * 704 + 2 * 256
    assert parameter_count(ModelConfig()) == 2 * 4096 * 256 + 4 * block + 256


@pytest.mark.parametrize(("tied", "positions"), [*product([False, True], ["rotary", "learned"])])
def test_flops(tied, positions):
    """The head multiplies, tied or not, and its padding too. Look-ups of tokens and positions do
    not."""
    block = 2 * 24 * 24 + 2 * 24 * 12 + 3 * 24 * 40 + 2 * 24
    scores = (
        2 * (4 * 6) * 100 / 2
    )  # multiply-adds per token: with keys and with values, causal half of them
    want = 6 * (56 * 24 + 2 * block + 24) + 2 * 3 * 2 * scores
    assert flops_per_token(replace(SMALL, tied=tied, positions=positions), 100) == want


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "sgd"])
def test_uneven_shards_of_weights_with_three_dims(name):
    """The gradient of an uneven shard is a slice of a padded buffer, so it is not contiguous."""
    c = model_config("dp=3", 2, batch=12, zero=2, optim=OptimConfig(name=name))
    want = verify.one_step(verify.on_one_device(c), MeshShape())
    assert_same_result(want, verify.one_step(c, MeshShape.parse("dp=3")))
