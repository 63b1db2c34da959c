"""The validation loss of a run: the mean cross entropy over the same held-out rows on every mesh,
so that runs can be compared."""

from __future__ import annotations

from typing import Any

import torch

from dtron.data import Data
from dtron.distributed.redistribute import full
from dtron.params import unshard
from dtron.runtime.batches import split, to_host
from dtron.runtime.config import RunConfig
from dtron.training.config import RunPlan
from dtron.training.gradients import evaluate
from dtron.training.pipeline import Pipeline, program

VALIDATION_ROWS = 32


@torch.no_grad()
def validate(params: Any, data: Data, config: RunConfig, plan: RunPlan, pipe: Pipeline) -> float:
    """Return the mean cross entropy per valid target of the held-out rows. Every rank calls this;
    all get the same number. Padding rows of a microbatch do not count."""
    held_out = data.validation.rows(0, min(VALIDATION_ROWS, len(data.validation)))
    batch = to_host(held_out.filled(plan.rows), config, plan)
    microbatches = split(batch, config, plan, pipe.layout)
    weights = params if plan.gather_each else unshard(params, pipe.layout)
    total = evaluate(program(config.model, pipe.layout), weights, microbatches, pipe)
    return pipe.sum(None if total is None else full(total)).item() / batch.valid
