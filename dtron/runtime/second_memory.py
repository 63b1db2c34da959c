"""The memory of the second model of a loss, from the config alone.

The weights of the second model are kept beside those of the step, in the compute dtype, with the
placements that ``--zero`` gives them. A reference that is the frozen base of LoRA takes nothing.
``dtron plan``, ``dtron show`` and the check at the start count them with ``second_model_bytes``.

Left out: the all-gathered weights while the second model runs. ``dtron plan`` has them.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from dtron.distributed.mesh_shape import MeshShape
from dtron.model.stages import layers_per_stage, split_into_stages
from dtron.params import WeightSpec
from dtron.rules import place, rules_for
from dtron.runtime.check_loss import second_config
from dtron.runtime.config import RunConfig
from dtron.schedules import Table
from dtron.training.reference import uses_frozen_base
from dtron.tree import flat


def second_dtype(w: WeightSpec, compute: torch.dtype, master: torch.dtype) -> torch.dtype:
    """Return the dtype of a weight of the second model, which is never updated."""
    return w.dtype or (master if w.buffer else compute)


def second_model_bytes(
    config: RunConfig, shape: MeshShape, table: Table, compute: torch.dtype, master: torch.dtype
) -> list[int]:
    """Return the bytes of the second model's weights on a rank of each pipeline rank: on the rank
    that holds most. Zeros if the loss keeps no second model.

    ``table``: the schedule, which places the stages on pipeline ranks."""
    ranks = range(len(table.rows))
    if config.loss.objective.second_model is None or uses_frozen_base(config):
        return [0 for _ in ranks]
    m = second_config(config)
    stages = split_into_stages(m, layers_per_stage(m, table.stages, config.data.seq_len))
    atoms = {a: n for a, n in shape.atoms.items() if a != "pp"}

    def nbytes(w: WeightSpec) -> int:
        sizes = list(w.shape)
        placements: Any = place(rules_for(config.zero), list(atoms), *w.axes)
        for n, placement in zip(atoms.values(), placements, strict=True):
            if placement.is_shard():
                sizes[placement.dim] = -(-sizes[placement.dim] // n)
        return math.prod(sizes) * second_dtype(w, compute, master).itemsize

    return [sum(nbytes(w) for s in table.stages_of(r) for w in flat(stages[s])) for r in ranks]
