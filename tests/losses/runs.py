"""One step with a loss: its config, and the same loss and gradients in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dtron.distributed.mesh_shape import MeshShape
from dtron.frozen import trained
from dtron.layers.cross_entropy import IGNORE
from dtron.losses.config import LossConfig
from dtron.mesh import Layout
from dtron.model.batch import Batch
from dtron.model.transformer import predict
from dtron.runtime.config import DataConfig, ModelConfig, RunConfig
from dtron.tools.verify import on_one_device
from dtron.tools.verify_step import one_step, plan_of, second_model, step_inputs
from dtron.training.build import build_step
from dtron.training.pipeline import pipeline
from dtron.tree import flat, leaves, tree_map
from tests.helpers.same_step import assert_same_result

ONE = Layout()
SMALL = ModelConfig(
    vocab=29,
    embed=12,
    layers=2,
    heads=4,
    kv_heads=4,
    head_dim=4,
    mlp=16,
    vocab_multiple=1,
    context=24,
)


def run_of(
    loss: LossConfig, mesh: str = "", model: ModelConfig = SMALL, **choices: Any
) -> RunConfig:
    """A step of several microbatches, whose rows have several documents."""
    shape = MeshShape.parse(mesh)
    data = DataConfig(seq_len=16, document_mask=True)
    batch = 2 * shape.data * (2 if shape.pp == 1 else 3)
    return RunConfig(
        mesh=mesh, model=model, batch=batch, micro_batch=2, data=data, loss=loss, **choices
    )


def assert_equal_on(mesh: str, loss: LossConfig, mutate: Any = None, **choices: Any) -> None:
    config = run_of(loss, mesh, **choices)
    want = one_step(on_one_device(config), MeshShape())
    assert_same_result(want, one_step(config, MeshShape.parse(mesh), mutate))


Plain = Callable[[Tensor, Tensor, Batch], tuple[Tensor, int]]


def assert_equal_to(plain: Plain, config: RunConfig) -> None:
    """Loss and gradients are those of ``plain(logits, logits of the second model, batch)``, which
    returns a sum and the number of its terms."""
    plan = plan_of(config, MeshShape(), torch.float64)
    pipe = pipeline(config, MeshShape(), plan.count, config.data.seq_len, ONE)
    second = second_model(config, pipe, plan)
    step = build_step(config, plan, pipe, reference=second)
    params, batches, terms = step_inputs(config, pipe, plan.count, torch.float64)
    got_loss, got, reports = step.gradients(params, batches)
    tree = tree_map(lambda w: w.clone().requires_grad_(w.is_floating_point()), params)
    of_second = None if second is None else second.weights or _without_effect(pipe.spec, params)
    total, counted = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        scores = predict(tree[0], batch, config.model, ONE)
        other = scores.detach()
        if second is not None:
            with torch.no_grad():
                other = predict(of_second[0], batch, config.model, ONE)
        loss, number = plain(scores, other, batch)
        total, counted = total + loss, counted + number
    assert counted == terms > 2
    torch.testing.assert_close(got_loss, total.detach(), rtol=1e-12, atol=1e-12)
    want = torch.autograd.grad(total, flat(trained(pipe.spec, tree)), allow_unused=True)
    for (path, g), w in zip(leaves(got), want, strict=True):
        w = torch.zeros_like(g) if w is None else w
        assert (g - w).abs().max() <= 1e-10 * max(1.0, w.abs().max()), path


def _without_effect(spec: Any, params: Any) -> Any:
    """The weights with updates that are 0."""
    return tree_map(lambda w, x: x * 0 if w.path.endswith("lora_b") else x, spec, params)


def own_log_probs(scores_TV: Tensor, batch: Batch) -> Tensor:
    """The log-probability of each target, 0 where it does not count."""
    words = batch.targets_T.clamp(min=0)[:, None]
    return scores_TV.log_softmax(-1).gather(1, words)[:, 0] * (batch.targets_T != IGNORE)
