"""The state that a run starts from: random weights, a published model, or a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dtron import checkpoint
from dtron.checkpoint.memory_copies import MemoryCopies
from dtron.checkpoint.storage import AnyPath
from dtron.data import Data
from dtron.distributed.symmetric_memory import publish_weights
from dtron.errors import UserError
from dtron.hf import Source
from dtron.hf.adapter import Adapter
from dtron.mesh import Layout
from dtron.model.lora import is_update
from dtron.params import WeightSpec, draw, stored_dtype
from dtron.runtime.config import RunConfig, identity_of
from dtron.runtime.launch import same_on_all_ranks
from dtron.training.config import RunPlan
from dtron.training.optim_config import build_optimizer
from dtron.training.optimizer import init_state, stored_params, with_compute_copies
from dtron.training.pipeline import Pipeline
from dtron.training.reference import needs_initial_weights
from dtron.tree import fill, flat


def identity(config: RunConfig, data: Data, source: Source | None = None) -> dict[str, Any]:
    """Return the settings that must be the same when the run is resumed. Raises UserError if the
    flags or the data differ between ranks.

    ``source``: the folder of the frozen weights, which are in no checkpoint."""
    settings = identity_of(config, data.digest())
    if source is not None and (config.lora.rank or needs_initial_weights(config)):
        settings["frozen weights"] = source.digest()
    if data.samples is not None:
        settings["data.samples"] = data.samples
    may_change = {"batch": config.batch, "optim": config.optim, "steps": config.steps}
    same_on_all_ranks(settings | may_change)
    return settings


def source_of(config: RunConfig, resumed: AnyPath | None = None) -> Source | None:
    """Open the folder of the weights that a run begins with; None: they are random, or all of them
    are in the checkpoint ``resumed``. Frozen weights and a second model are in no checkpoint."""
    needed = resumed is None or config.lora.rank > 0 or needs_initial_weights(config)
    return Source(config.init_from, config.model) if config.init_from and needed else None


def initial_weight(
    w: WeightSpec,
    config: RunConfig,
    source: Source | None,
    layout: Layout,
    dtype: torch.dtype,
    device: str,
    adapter: Adapter | None = None,
) -> Tensor | None:
    """Return a weight as a run begins with it; None: it follows from other weights.

    ``source``: see ``source_of``.
    ``adapter``: the initial updates of LoRA (None: random ones, whose effect is 0)."""
    with torch.no_grad():
        folder = adapter if is_update(w) else source
        if folder is not None:
            return folder.weight(w, layout, dtype, device)
        if w.derived:
            return None
        return layout.shard(draw(w, config.model.dims(), config.seed, device).to(dtype), *w.axes)


def initial_state(
    config: RunConfig,
    plan: RunPlan,
    pipe: Pipeline,
    identity: dict[str, Any],
    resumed: AnyPath | None,
    source: Source | None,
    copies: MemoryCopies,
) -> checkpoint.TrainState:
    """Return weights and optimizer state, with the placements of this run.

    ``resumed``: the checkpoint to resume from, or None.
    ``source``: the Hugging Face folder of the initial weights, or None: they are random.
    ``copies``: if they are newer than the checkpoint, the state is theirs.

    Raises UserError for a checkpoint of another run, or of a run that has reached its last step."""
    spec, layout = pipe.spec, pipe.layout
    adapter = None
    if config.lora.adapter and resumed is None and source is not None:
        adapter = Adapter(config.lora.adapter, source.family, config.model)

    def load(w: WeightSpec) -> Tensor | None:
        dtype = stored_dtype(w, layout, plan.master)
        return initial_weight(w, config, source, layout, dtype, plan.device, adapter)

    params = fill(spec, load)
    opt = init_state(build_optimizer(config.optim), spec, params)
    state = checkpoint.TrainState(0, 0, stored_params(params, spec, opt), opt)
    del params
    same_on_all_ranks({"the newest checkpoint": resumed and resumed.name})
    last = -1 if resumed is None else checkpoint.read_meta(resumed).step
    if (newer := copies.resume(state, last)) is not None:
        state = newer
    elif resumed is not None:
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
