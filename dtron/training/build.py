"""The step that trains, built once: train.py, the benchmarks, ``dtron.verify`` and the tests call
this."""

from __future__ import annotations

from collections.abc import Callable

from dtron.schedules.runner import Program
from dtron.training.compiled_stage import compiled
from dtron.training.config import RunPlan, StepConfig
from dtron.training.cuda_graph import CudaGraphStep
from dtron.training.optim_config import build_optimizer
from dtron.training.pipeline import Pipeline, program
from dtron.training.step import TrainStep


def build_step(
    config: StepConfig,
    plan: RunPlan,
    pipe: Pipeline,
    backend: str = "inductor",
    overlap: bool = True,
    wrap: Callable[[Program], Program] = lambda functions: functions,
) -> TrainStep | CudaGraphStep:
    """The step of a config on the ranks that ``pipe`` is of: eager, compiled, or recorded, as
    ``plan`` says.

    ``backend``: of torch.compile.
    ``overlap``: collectives are moved ahead of what needs them.
    ``wrap``: what a proof or a test puts around the model's functions before they are compiled."""
    functions = wrap(program(config.model, pipe.layout, config.how, plan.splits))
    optimizer = build_optimizer(config.optim)
    if plan.compile:
        functions = compiled(functions, pipe.layout, config.how, backend, overlap, plan.gather_each)
        optimizer = optimizer.compiled(backend)
    step = TrainStep(functions, pipe, config, optimizer, plan.gather_each)
    return CudaGraphStep(step, plan.device) if plan.cuda_graph else step
