"""The weights of the second model of a run's loss: from a folder, or as the run begins."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dtron.distributed.symmetric_memory import publish_weights
from dtron.hf import Source
from dtron.params import WeightSpec
from dtron.runtime.check_loss import second_config
from dtron.runtime.config import RunConfig
from dtron.runtime.initial_state import initial_weight
from dtron.runtime.second_memory import second_dtype
from dtron.training.config import RunPlan
from dtron.training.pipeline import Pipeline
from dtron.training.reference import Reference, build_reference
from dtron.tree import fill, flat


def second_model(
    config: RunConfig, plan: RunPlan, pipe: Pipeline, source: Source | None
) -> Reference | None:
    """Return the second model, with the placements of this run. None if the loss has none.

    ``source``: the Hugging Face folder of the initial weights; None: they are random."""
    m = second_config(config)
    folder = Source(config.loss.folder, m) if config.loss.folder else source

    def load(own: Pipeline) -> Any:
        def weight(w: WeightSpec) -> Tensor | None:
            dtype = second_dtype(w, plan.compute, plan.master)
            return initial_weight(w, config, folder, own.layout, dtype, plan.device)

        weights: Any = fill(own.spec, weight)
        publish_weights(flat(weights))
        return weights

    return build_reference(config, m, pipe, plan, config.data.seq_len, load)
