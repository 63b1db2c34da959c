"""The second model of a loss: the reference of DPO, or the teacher of distillation.

The second model runs forwards on the same ranks before the step, through its own pipeline stages,
and with its own placements. Its last stage is on the ranks of the model's last stage. So what the
loss needs of it (``Objective.reference``) is where the loss is computed, and nothing is sent. Its
functions are eager, as in the validation of a run.

Left out: a compiled second model; a second model on other ranks than the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dtron.distributed.mesh_shape import MeshShape
from dtron.losses.objective import Objective
from dtron.mesh import Layout
from dtron.model.batch import Batch
from dtron.model.config import ModelConfig
from dtron.model.head import loss_options
from dtron.model.lora import LoraConfig, without_updates
from dtron.model.transformer import embed, stage_then
from dtron.params import unshard
from dtron.schedules.runner import Program
from dtron.training.config import RunPlan, StepConfig
from dtron.training.gradients import forwards
from dtron.training.pipeline import Pipeline, pipeline


@dataclass(frozen=True)
class Reference:
    """A second model.

    ``model``: its config.
    ``pipe``: its stages on the ranks of the model.
    ``weights``: the trees of the stages of this process; None: the weights of the step, without
        the updates of LoRA.
    ``gather_each``: its functions all-gather the weights themselves, as ZeRO-3 does."""

    objective: Objective
    model: ModelConfig
    pipe: Pipeline
    weights: Any
    gather_each: bool

    @torch.no_grad()
    def attach(self, weights: Any, microbatches: Sequence[Batch]) -> list[Batch]:
        """Return the microbatches with what the loss needs of this model. On a rank without the
        last stage they stay as they are.

        ``weights``: those of the step, that compute."""
        pipe = self.pipe.for_count(len(microbatches))
        own = without_updates(weights) if self.weights is None else self.weights
        own = own if self.gather_each else unshard(own, pipe.layout)
        functions = reference_program(self.objective, self.model, pipe.layout)
        results = forwards(functions, own, microbatches, pipe)
        if not results:
            return list(microbatches)
        return [replace(b, reference=r) for b, r in zip(microbatches, results, strict=True)]


def uses_frozen_base(config: StepConfig) -> bool:
    """Whether the second model is the model itself without the updates of LoRA."""
    second = config.loss.objective.second_model
    return second is not None and config.lora.rank > 0 and not config.loss.folder


def needs_initial_weights(config: StepConfig) -> bool:
    """Whether the second model is the model as the run begins, also where the run goes on from a
    checkpoint."""
    return config.loss.objective.second_model is not None and not config.loss.folder


def build_reference(
    config: StepConfig,
    m: ModelConfig,
    pipe: Pipeline,
    plan: RunPlan,
    seq_len: int,
    load: Callable[[Pipeline], Any],
) -> Reference | None:
    """Return the second model of the loss. None if the loss has none.

    ``m``: the config of the second model.
    ``pipe``: the pipeline of the step.
    ``load``: returns the weights of the second model, for its own pipeline."""
    objective = config.loss.objective
    if objective.second_model is None:
        return None
    if uses_frozen_base(config):
        return Reference(objective, config.model, pipe, None, plan.gather_each)
    own = second_pipeline(config, m, pipe, plan.shape, seq_len)
    return Reference(objective, m, own, load(own), plan.gather_each)


def second_pipeline(
    config: StepConfig, m: ModelConfig, pipe: Pipeline, shape: MeshShape, seq_len: int
) -> Pipeline:
    """Return the pipeline of a second model on the ranks of ``pipe``, with its process groups."""
    schedule = replace(config.pipeline, layers="")
    plain = replace(config, model=m, lora=LoraConfig(), pipeline=schedule)
    counts = [t.microbatches for t in (pipe.table, *pipe.tables)]
    made = pipeline(plain, shape, counts[0], seq_len, pipe.layout, counts)
    template = None if pipe.template is None else pipe.template.new_empty(0, m.embed)
    own = {f.name: getattr(made, f.name) for f in fields(made)}
    own |= {"groups": pipe.groups, "template": template, "timeout": pipe.timeout}
    return replace(pipe, **own)  # a plan has a pipeline of another class


def reference_program(objective: Objective, m: ModelConfig, layout: Layout) -> Program:
    """Return the model's functions, whose last stage returns ``Objective.reference``."""

    def stage(p: Any, x_TD: Tensor, batch: Batch) -> tuple[Any, None]:
        inputs = batch.loss_inputs(layout)

        def end(x_TD: Tensor, w_head: Tensor) -> tuple[Any, ...]:
            return objective.reference(x_TD, w_head, inputs, loss_options(m), layout)

        return stage_then(p, x_TD, batch, end, m, layout)

    return Program(partial(embed, m=m, layout=layout), stage)
