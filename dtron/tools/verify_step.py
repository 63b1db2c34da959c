"""One optimizer step on random tokens, as ``dtron.verify`` takes it: on one device or on simulated
ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full
from dtron.distributed.simulated_ranks import paused, simulated
from dtron.layers.cross_entropy import IGNORE
from dtron.mesh import Layout
from dtron.model.batch import Batch, make_batch, valid_tokens
from dtron.params import WeightSpec, draw, flat, tree_map
from dtron.rules import rules_for
from dtron.runtime.config import RunConfig
from dtron.runtime.validate import microbatches
from dtron.schedules.runner import Program
from dtron.tools.compare_steps import StepResult
from dtron.tools.count_collectives import CollectiveCounter, no_hidden_communication
from dtron.tools.poisoned_memory import poisoned_memory
from dtron.training.build import build_step
from dtron.training.config import RunPlan
from dtron.training.optimizer import init_state, with_compute_copies
from dtron.training.pipeline import Pipeline, pipeline

Watch = Callable[[Any], AbstractContextManager]


class StepInputs(NamedTuple):
    """The weights before the step, by stage, its microbatches, and the number of valid targets."""

    params: Any
    batches: list[Batch]
    tokens: int


def step_inputs(config: RunConfig, pipe: Pipeline, count: int, dtype: torch.dtype) -> StepInputs:
    """Draw weights and a global batch.

    ``count``: the number of microbatches.
    ``dtype``: of the weights."""
    m, layout = config.model, pipe.layout
    documents = positions = None
    with paused():  # all ranks have the same global batch
        rows = _random_rows(config)
        if config.data.document_mask:
            documents, positions = _random_documents(config)

    def place(w: WeightSpec) -> Tensor:
        return layout.shard(draw(w, m.dims(), config.seed).to(dtype), *w.axes)

    def parts(x: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * count if x is None else x.chunk(count)

    batches = [
        make_batch(r, layout, d, at, depth=m.mtp.depth, zigzag=config.zigzags)
        for r, d, at in zip(rows.chunk(count), parts(documents), parts(positions), strict=True)
    ]
    return StepInputs(tree_map(place, pipe.spec), batches, valid_tokens(rows))


def one_step(
    config: RunConfig,
    shape: MeshShape,
    mutate: Callable[[Layout], Layout] = lambda x: x,
    dtype: torch.dtype = torch.float64,
    watch: Watch = lambda weights: nullcontext(),
) -> StepResult:
    """Take the step of ``config`` on simulated ranks (``MeshShape()`` is one device).

    ``dtype``: in which to compute. Below float32 the master weights are in float32, and unwritten
        memory is poisoned.
    ``watch``: makes a context for the step from pairs of a path and a weight."""
    low = dtype.itemsize < 4
    master = torch.float32 if low else dtype
    count, _ = microbatches(config.batch, config.micro_batch, shape)
    with simulated(shape) as mesh:
        layout = mutate(Layout(mesh, rules_for(config.zero), compute=dtype if low else None))
        pipe = pipeline(config, shape, count, config.data.seq_len, layout)
        params, batches, tokens = step_inputs(config, pipe, count, master)
        plan = RunPlan.eager(config, shape, count, master, dtype)
        step = build_step(config, plan, pipe, wrap=_guarded)
        opt = init_state(step.optimizer, pipe.spec, params)
        opt = with_compute_copies(opt, params, pipe.spec, layout.compute)
        weights = params if opt.compute_copies is None else opt.compute_copies
        pairs = [(w.path, x) for w, x in zip(flat(pipe.spec), flat(weights), strict=True)]
        poison = poisoned_memory() if low else nullcontext()
        with poison, CollectiveCounter(mesh) as counter, watch(pairs):
            done = [*step.gradients(weights, batches)]
        whole = partial(pipe.whole, fn=lambda x: full(x).clone())
        grads = whole(done[1])  # the update consumes them
        loss, norm, _, params, opt = step.update(params, opt, done, tokens, config.optim.lr)
        state = {name: whole(tree) for name, tree in opt.trees.items()}
        return StepResult(loss.item(), norm.item(), grads, whole(params), state, counter)


def _guarded(functions: Program) -> Program:
    """Wrap the functions in the guard against hidden communication."""

    def guard(fn: Callable) -> Callable:
        def guarded(*args):
            with no_hidden_communication():
                return fn(*args)

        return guarded

    return replace(functions, enter=guard(functions.enter), stage=guard(functions.stage))


def _random_rows(config: RunConfig) -> Tensor:
    """Draw a global batch of random tokens. Some targets are ignored, unevenly over the rows."""
    g = torch.Generator().manual_seed(config.seed)
    rows = torch.randint(config.model.vocab, (config.batch, config.data.seq_len + 1), generator=g)
    rows[:: max(2, config.batch // 3), -max(1, config.data.seq_len // 3) :] = IGNORE
    return rows


def _random_documents(config: RunConfig) -> tuple[Tensor, Tensor]:
    """Draw ``(document, position)`` of every token; about every tenth token begins a document."""
    g = torch.Generator().manual_seed(config.seed + 1)
    begins = torch.rand(config.batch, config.data.seq_len, generator=g) < 0.1
    places = torch.arange(config.data.seq_len).expand(begins.shape)
    starts = torch.where(begins, places, 0).cummax(1).values
    return begins.cumsum(1), places - starts
