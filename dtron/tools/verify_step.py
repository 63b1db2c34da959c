"""One optimizer step on random tokens, for ``dtron.verify``, on one device or simulated ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full
from dtron.distributed.simulated_ranks import paused, simulated
from dtron.layers.cross_entropy import IGNORE
from dtron.losses.sequence_sums import count_pairs
from dtron.mesh import Layout
from dtron.model.batch import Batch, make_batch, valid_tokens
from dtron.params import WeightSpec, draw, init, normal, stored_dtype, zeros
from dtron.rules import rules_for
from dtron.runtime.config import RunConfig
from dtron.runtime.validate import microbatches
from dtron.schedules.runner import Program
from dtron.tools.compare_steps import StepResult
from dtron.tools.count_collectives import CollectiveCounter, no_hidden_communication
from dtron.tools.poisoned_memory import poisoned_memory
from dtron.training.build import build_step
from dtron.training.config import RunPlan
from dtron.training.optimizer import init_state, stored_params, with_compute_copies
from dtron.training.pipeline import Pipeline, pipeline
from dtron.training.reference import Reference, build_reference
from dtron.training.state_formats import values
from dtron.training.step import TrainStep
from dtron.tree import fill, flat, tree_map

Watch = Callable[[Any], AbstractContextManager]


class StepInputs(NamedTuple):
    """The weights before the step, by stage, its microbatches, and the number of valid targets or
    pairs."""

    params: Any
    batches: list[Batch]
    tokens: int


def step_inputs(config: RunConfig, pipe: Pipeline, count: int, dtype: torch.dtype) -> StepInputs:
    """Draw weights and a global batch.

    ``count``: the number of microbatches.
    ``dtype``: of the weights."""
    m, layout = config.model, pipe.layout
    documents = positions = None
    sequences = config.loss.objective.sequences
    with paused():  # all ranks have the same global batch
        rows = _random_rows(config)
        if config.data.masked:
            documents, positions = _random_documents(config)

    def place(w: WeightSpec) -> Tensor:
        x = draw(_normal(w), m.dims(), config.seed)
        x = 1 + x if w.derived else x
        return layout.shard(x.to(stored_dtype(w, layout, dtype)), *w.axes)

    def parts(x: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * count if x is None else x.chunk(count)

    batches = [
        make_batch(
            r,
            layout,
            d,
            at,
            depth=m.mtp.depth,
            zigzag=config.zigzags,
            needed=m.moe.capacity_factor > 0,
            sequences=sequences,
        )
        for r, d, at in zip(rows.chunk(count), parts(documents), parts(positions), strict=True)
    ]
    terms = valid_tokens(rows)
    if sequences:
        assert documents is not None  # the config of such a loss masks documents
        terms = count_pairs(documents, rows[:, 1:] != IGNORE)
    return StepInputs(fill(pipe.spec, place), batches, terms)


def second_model(config: RunConfig, pipe: Pipeline, plan: RunPlan) -> Reference | None:
    """Return the second model of the loss: random weights, or with LoRA the frozen weights of the
    step. None if the loss has no second model."""
    m, seq_len = config.model, config.data.seq_len

    def load(own: Pipeline) -> Any:
        spec = tree_map(_normal, own.spec)
        return init(spec, m.dims(), config.seed + 1, own.layout, plan.master)

    return build_reference(config, m, pipe, plan, seq_len, load)


def _normal(w: WeightSpec) -> WeightSpec:
    """Zeros in a product would hide a wrong gradient of the other factor."""
    return replace(w, init=normal) if w.init is zeros and not w.buffer else w


def one_step(
    config: RunConfig,
    shape: MeshShape,
    mutate: Callable[[Layout], Layout] | None = None,
    dtype: torch.dtype = torch.float64,
    watch: Watch = nullcontext,
) -> StepResult:
    """Take the step of ``config`` on simulated ranks (``MeshShape()`` is one device).

    ``mutate``: changes the layout, for mutants of tests.
    ``dtype``: compute dtype. Below float32 the master weights are in float32, and unwritten memory
    is poisoned.
    ``watch``: makes a context for the step from pairs of a path and a weight."""
    plan = plan_of(config, shape, dtype)
    with simulated(shape) as mesh:
        layout = Layout(mesh, rules_for(config.zero), compute=compute_copies_in(dtype))
        layout = layout if mutate is None else mutate(layout)
        pipe = pipeline(config, shape, plan.count, config.data.seq_len, layout)
        counter = CollectiveCounter(mesh)

        @contextmanager
        def around(weights: Any) -> Iterator[None]:
            with counter, watch(zip([w.path for w in flat(pipe.spec)], flat(weights), strict=True)):
                yield

        def whole(trees: Any) -> Any:
            return pipe.whole(trees, _unsharded)

        second = second_model(config, pipe, plan)
        step = build_step(config, plan, pipe, wrap=_guarded, reference=second)
        assert isinstance(step, TrainStep)  # ``plan`` records no CUDA graph
        return replace(take_step(config, step, plan, whole, around), collectives=counter)


def _unsharded(x: Tensor) -> Tensor:
    return full(x).clone()


def compute_copies_in(dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype of the weights' compute copies. None: the masters have this dtype."""
    return dtype if dtype.itemsize < 4 else None


def plan_of(config: RunConfig, shape: MeshShape, dtype: torch.dtype) -> RunPlan:
    """Return the plan of an eager step that computes in ``dtype``. Master weights have float32 at
    least."""
    parts = microbatches(config.ramp.sizes[0], config.micro_batch, shape)
    return RunPlan.eager(config, shape, parts, torch.promote_types(dtype, torch.float32), dtype)


def take_step(
    config: RunConfig,
    step: TrainStep,
    plan: RunPlan,
    whole: Callable[[Any], Any],
    around: Watch = nullcontext,
) -> StepResult:
    """Draw weights and a batch, and take the step with them. Unwritten memory is poisoned if the
    step computes in fewer bits than float32.

    ``whole``: makes whole tensors of the stages' trees.
    ``around``: makes a context for the gradients from the weights that compute."""
    pipe, copies = step.pipe, compute_copies_in(plan.compute)
    params, batches, tokens = step_inputs(config, pipe, plan.count, plan.master)
    opt = init_state(step.optimizer, pipe.spec, params)
    params = stored_params(params, pipe.spec, opt)
    opt = with_compute_copies(opt, params, pipe.spec, copies)
    weights = params if opt.compute_copies is None else opt.compute_copies
    initial = whole(params) if pipe.layout.mesh is None else None
    with poisoned_memory() if copies else nullcontext(), around(weights):
        done = [*step.gradients(weights, batches)]
    grads = whole(done[1])  # the update consumes them
    loss, norm, _, params, opt = step.update(params, opt, done, tokens, config.optim.lr)
    params, trees = values(pipe.spec, params, opt.trees)
    state = {name: whole(tree) for name, tree in trees.items()}
    return StepResult(loss.item(), norm.item(), grads, whole(params), state, None, initial)


def _guarded(functions: Program) -> Program:
    """Wrap the functions in the guard against hidden communication."""

    def guard(fn: Callable) -> Callable:
        def guarded(*args: Any, **named: Any) -> Any:
            with no_hidden_communication():
                return fn(*args, **named)

        return guarded

    return replace(functions, enter=guard(functions.enter), stage=guard(functions.stage))


def _random_rows(config: RunConfig) -> Tensor:
    """Draw a global batch of random tokens. Some targets are ignored: the end of some rows, and
    about every tenth token anywhere."""
    g, batch = torch.Generator().manual_seed(config.seed), config.ramp.sizes[0]
    rows = torch.randint(config.model.vocab, (batch, config.data.seq_len + 1), generator=g)
    rows[:: max(2, batch // 3), -max(1, config.data.seq_len // 3) :] = IGNORE
    return rows.masked_fill(torch.rand(rows.shape, generator=g) < 0.1, IGNORE)


def _random_documents(config: RunConfig) -> tuple[Tensor, Tensor]:
    """Draw ``(document, position)`` of every token; about every tenth token begins a document."""
    g = torch.Generator().manual_seed(config.seed + 1)
    begins = torch.rand(config.ramp.sizes[0], config.data.seq_len, generator=g) < 0.1
    places = torch.arange(config.data.seq_len).expand(begins.shape)
    starts = torch.where(begins, places, 0).cummax(1).values
    return begins.cumsum(1), places - starts
