"""The best learning rate of a narrow model is the best one at four times its width under muP. Under
the standard parametrization it is not."""

from __future__ import annotations

from functools import cache

import torch

from dtron.distributed.mesh_shape import MeshShape
from dtron.mesh import Layout
from dtron.model.batch import make_batch, valid_tokens
from dtron.model.widths import at_width
from dtron.params import init
from dtron.runtime.config import DataConfig, ModelConfig, OptimConfig, RunConfig
from dtron.tools.verify_step import plan_of
from dtron.training.build import build_step
from dtron.training.optimizer import init_state
from dtron.training.pipeline import pipeline

NARROW, STEPS, SEQ_LEN, ROWS = 32, 36, 16, 16
RATES = [4.0**-k for k in range(2, 6)]


@cache
def final_loss(base: int, width: int, rate: float) -> float:
    """Train on three batches of random tokens, again and again. Return the mean loss of the last
    six steps.

    ``base``: the base width of muP; 0: the standard parametrization."""
    m = ModelConfig(
        vocab=32,
        embed=NARROW,
        layers=2,
        heads=2,
        kv_heads=2,
        head_dim=16,
        mlp=64,
        vocab_multiple=1,
        init_std=0.1,
        mup_base_width=base,
    )
    c = RunConfig(
        model=at_width(m, width),
        batch=ROWS,
        micro_batch=ROWS,
        data=DataConfig(seq_len=SEQ_LEN),
        optim=OptimConfig(weight_decay=0.0, max_grad_norm=0.0),
    )
    layout = Layout()
    pipe = pipeline(c, MeshShape(), 1, SEQ_LEN, layout)
    step = build_step(c, plan_of(c, MeshShape(), torch.float32), pipe)
    params = init(pipe.spec, c.model.dims(), 0, layout)
    opt, losses = init_state(step.optimizer, pipe.spec, params), []
    for number in range(STEPS):
        g = torch.Generator().manual_seed(number % 3)
        rows = torch.randint(m.vocab, (ROWS, SEQ_LEN + 1), generator=g)
        batch = make_batch(rows, layout)
        loss, _, _, params, opt = step(params, opt, [batch], valid_tokens(rows), rate)
        losses.append(loss.item())
    return sum(losses[-6:]) / 6


def best(base: int, width: int) -> float:
    return min(RATES, key=lambda rate: final_loss(base, width, rate))


def test_the_best_rate_holds_at_four_times_the_width():
    assert best(NARROW, NARROW) == best(NARROW, 4 * NARROW) == best(0, NARROW)
    assert best(0, 4 * NARROW) <= best(0, NARROW) / 4


def test_a_wider_model_is_better_at_the_rate_of_the_narrow_one():
    rate = best(NARROW, NARROW)
    assert final_loss(NARROW, 4 * NARROW, rate) < final_loss(NARROW, NARROW, rate)
    assert final_loss(0, 4 * NARROW, rate) > 2 * final_loss(NARROW, 4 * NARROW, rate)
