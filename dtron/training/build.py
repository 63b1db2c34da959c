"""The step that trains, built in one place for train.py, the benchmarks, ``dtron.verify`` and the
tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dtron.schedules.runner import Program
from dtron.training.compiled_stage import compiled
from dtron.training.config import RunPlan, StepConfig
from dtron.training.cuda_graph import CudaGraphStep
from dtron.training.optim_config import build_optimizer
from dtron.training.pipeline import Pipeline, program
from dtron.training.reference import Reference
from dtron.training.step import TrainStep


def build_step(
    config: StepConfig,
    plan: RunPlan,
    pipe: Pipeline,
    backend: Any = "inductor",
    overlap: bool = True,
    wrap: Callable[[Program], Program] | None = None,
    reference: Reference | None = None,
) -> TrainStep | CudaGraphStep:
    """Build the step of a config on the ranks of ``pipe``: eager, compiled, or recorded, as
    ``plan`` says.

    ``backend``: a backend of torch.compile, or a ``CodeGenerator`` (torch_compile.py).
    ``overlap``: collectives are issued ahead of their use.
    ``wrap``: changes the model's functions before they are compiled, for proofs and tests.
    ``reference``: the second model of the loss (None: the loss has none)."""
    splits = plan.splits and pipe.table.in_halves
    functions = program(config.model, pipe.layout, config.how, splits, config.loss.objective)
    if wrap is not None:
        functions = wrap(functions)
    optimizer = build_optimizer(config.optim, config.model.mup)
    if plan.compile:
        functions = compiled(functions, pipe.layout, config.how, backend, overlap)
        optimizer = optimizer.compiled(backend)
    step = TrainStep(functions, pipe, config, optimizer, plan.gather_each, reference)
    return CudaGraphStep(step, plan.device) if plan.cuda_graph else step
