"""The validation loss of a run: the mean loss over the same held-out rows on every mesh, so
that runs can be compared."""

from __future__ import annotations

from typing import Any

import torch

from dtron.checkpoint import TrainState
from dtron.data import Data
from dtron.distributed.redistribute import full
from dtron.frozen import with_frozen
from dtron.params import unshard
from dtron.runtime.batches import split, to_host
from dtron.runtime.config import RunConfig
from dtron.training.config import RunPlan
from dtron.training.gradients import evaluate
from dtron.training.offloaded_state import on_device
from dtron.training.pipeline import Pipeline, program
from dtron.training.reference import Reference
from dtron.training.weight_average import NAME as EMA

VALIDATION_ROWS = 32


def validation_losses(
    state: TrainState,
    data: Data,
    config: RunConfig,
    plan: RunPlan,
    pipe: Pipeline,
    reference: Reference | None = None,
) -> dict[str, float]:
    """Return the validation loss by its name in metrics.jsonl, and that of the average of the
    weights if the run keeps one."""
    average = None
    if config.optim.ema:
        # On the host with --optim.offload-state. A stage whose weights are all frozen has none.
        trained = on_device(state.opt.trees.get(EMA, ()), plan.device)
        average = with_frozen(pipe.spec, state.params, trained)
    params = {"validation_loss": state.params, "ema_validation_loss": average}
    return {
        name: validate(tree, data, config, plan, pipe, reference)
        for name, tree in params.items()
        if tree is not None
    }


@torch.no_grad()
def validate(
    params: Any,
    data: Data,
    config: RunConfig,
    plan: RunPlan,
    pipe: Pipeline,
    reference: Reference | None = None,
) -> float:
    """Return the mean loss of the held-out rows, per valid target or pair. Every rank calls this;
    all get the same number. Padding rows of a microbatch do not count."""
    held_out = data.validation.rows(0, min(VALIDATION_ROWS, len(data.validation)))
    batch = to_host(held_out.filled(plan.rows), config, plan)
    microbatches = split(batch, config, plan, pipe.layout)
    weights = params if plan.gather_each else unshard(params, pipe.layout)
    if reference is not None:
        microbatches = reference.attach(params, microbatches)
    functions = program(config.model, pipe.layout, objective=config.loss.objective)
    total = evaluate(functions, weights, microbatches, pipe)
    return pipe.sum(None if total is None else full(total)).item() / batch.terms
