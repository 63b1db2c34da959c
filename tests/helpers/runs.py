"""Train a few steps on random tokens, on any layout, and return the history."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full
from dtron.distributed.simulated_ranks import paused, simulated
from dtron.layers.cross_entropy import IGNORE
from dtron.mesh import Layout, stage_mesh
from dtron.model.batch import make_batch, valid_tokens
from dtron.params import init
from dtron.rules import rules_for
from dtron.runtime.config import ModelConfig, RunConfig
from dtron.runtime.validate import microbatches
from dtron.training.build import build_step
from dtron.training.config import RunPlan
from dtron.training.optimizer import init_state, stored_params, with_compute_copies
from dtron.training.pipeline import Pipeline, on_ranks, pipeline
from dtron.tree import flat, tree_map
from tests.helpers.real_mesh import destroy_groups, real_mesh

MODEL = ModelConfig(
    vocab=61,
    embed=24,
    layers=2,
    heads=4,
    kv_heads=4,
    head_dim=6,
    mlp=40,
    vocab_multiple=1,
    qk_norm=True,
    context=16,
)


@dataclass(frozen=True)
class History:
    losses: list[float]
    norms: list[float]
    initial: str  # digest of all initial weights
    params: Any


def train(
    layout: Layout,
    shape: MeshShape,
    config: RunConfig,
    dtype=torch.float32,
    device: str = "cpu",
    mesh=None,
    change: Callable[[Pipeline], Pipeline] = lambda pipe: pipe,
    change_step: Callable = lambda step: step,
) -> History:
    m = config.model
    count, rows_each = microbatches(config.batch, config.micro_batch, shape)
    template = torch.empty(0, m.embed, dtype=layout.compute or dtype, device=device)
    pipe = change(
        on_ranks(pipeline(config, shape, count, config.data.seq_len, layout), mesh, template)
    )
    spec = pipe.spec
    params = init(
        spec, m.dims(), config.seed, layout, dtype
    )  # drawn on the CPU: a GPU draws other numbers
    params = tree_map(lambda w: w.to(device), params)
    initial = digest(params)
    plan = RunPlan.eager(config, shape, (count, rows_each), dtype, layout.compute or dtype)
    step = build_step(config, plan, pipe)
    opt = init_state(step.optimizer, spec, params)
    params = stored_params(params, spec, opt)
    opt = with_compute_copies(opt, params, spec, layout.compute)
    step = change_step(step)
    losses, norms = [], []
    for number in range(config.steps):
        with paused():  # all ranks must draw the same rows
            rows = random_rows(config, number).to(device)
        batches = [
            make_batch(r, layout, depth=m.mtp.depth, zigzag=config.zigzags)
            for r in rows.chunk(count)
        ]
        loss, norm, _, params, opt = step(params, opt, batches, valid_tokens(rows), 1e-2)
        losses.append(loss.item())
        norms.append(norm.item())
    destroy_groups(pipe)
    return History(losses, norms, initial, tree_map(full, params))


def simulate(mesh: str, config: RunConfig, dtype=torch.float32) -> History:
    shape = MeshShape.parse(mesh)
    with simulated(shape) as device_mesh:
        return train(Layout(device_mesh, rules_for(config.zero)), shape, config, dtype)


def on_pool(
    mesh: str, config: RunConfig, dtype=torch.float32, **more: Any
) -> tuple[list[float], list[float], str]:
    """A job for the pool: the same on real ranks."""
    shape = MeshShape.parse(mesh)
    whole = real_mesh(mesh)
    history = train(
        Layout(stage_mesh(whole), rules_for(config.zero)), shape, config, dtype, mesh=whole, **more
    )
    return history.losses, history.norms, history.initial


def random_rows(config: RunConfig, step: int) -> torch.Tensor:
    """The global batch of a step, from a small set that can be learned. Some targets do not
    count."""
    g = torch.Generator().manual_seed(1000 * config.seed + step % 3)
    rows = torch.randint(config.model.vocab, (config.batch, config.data.seq_len + 1), generator=g)
    rows[::3, -5:] = IGNORE
    return rows


def digest(params: Any) -> str:
    h = hashlib.sha256()
    for w in flat(params):
        h.update(full(w).contiguous().cpu().numpy().tobytes())
    return h.hexdigest()
