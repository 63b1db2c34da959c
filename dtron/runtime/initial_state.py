"""The state that a run starts from: random weights, a published model, or a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dtron import checkpoint
from dtron.data import Data
from dtron.distributed.symmetric_memory import publish_weights
from dtron.errors import UserError
from dtron.hf import Source
from dtron.params import init
from dtron.runtime.config import RunConfig, identity_of
from dtron.runtime.launch import same_on_all_ranks
from dtron.training.config import RunPlan
from dtron.training.optim_config import build_optimizer
from dtron.training.optimizer import init_state, stored_params, with_compute_copies
from dtron.training.pipeline import Pipeline
from dtron.tree import flat


def identity(config: RunConfig, data: Data) -> dict[str, Any]:
    """Return the settings that must be the same when the run is resumed. Raises UserError if the
    flags or the data differ between ranks."""
    settings = identity_of(config, data.digest())
    if data.samples is not None:
        settings["data.samples"] = data.samples
    may_change = {"batch": config.batch, "optim": config.optim, "steps": config.steps}
    same_on_all_ranks(settings | may_change)
    return settings


def initial_state(
    config: RunConfig,
    plan: RunPlan,
    pipe: Pipeline,
    identity: dict[str, Any],
    resumed: Path | None,
    source: Source | None,
) -> checkpoint.TrainState:
    """Return weights and optimizer state, with the placements of this run.

    ``resumed``: the checkpoint to resume from, or None.
    ``source``: the Hugging Face folder of the initial weights, or None. If both are None, the
        weights are random.

    Raises UserError for a checkpoint of another run, or of a run that has reached its last step."""
    spec, layout = pipe.spec, pipe.layout
    if source is not None:
        params = source.load(spec, layout, plan.master, plan.device)
    else:
        dims = config.model.dims()
        params = init(spec, dims, config.seed, layout, plan.master, plan.device)
    opt = init_state(build_optimizer(config.optim), spec, params)
    state = checkpoint.TrainState(0, 0, stored_params(params, spec, opt), opt)
    del params
    same_on_all_ranks({"the newest checkpoint": resumed and resumed.name})
    if resumed is not None:
        state = checkpoint.load(resumed, state, spec, identity)
        if state.step >= config.steps:
            raise UserError(
                f"--steps {config.steps}: {resumed} is at step {state.step} already; use more steps"
            )
    copies = with_compute_copies(state.opt, state.params, spec, layout.compute)
    if copies.compute_copies is None:
        # Split master weights compute themselves. Other ranks may read them only once the
        # checkpoint has been loaded into them.
        publish_weights(flat(state.params))
    return replace(state, opt=copies)
