"""The update of the router bias, which balances the load of the experts (moe/balance.py).

The update needs only the reports of the step, and no gradient. ``training.gradients`` has summed
the reports over the global batch and over all ranks that have tokens. So every rank makes the same
update.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dtron.distributed.redistribute import to_local
from dtron.moe.balance import bias_step
from dtron.training.gradients import Reports
from dtron.training.pipeline import Pipeline


@torch.no_grad()
def update_router_bias(
    params: tuple[Any, ...], reports: Reports, pipe: Pipeline, rate: float, ok: Tensor | None = None
) -> tuple[Any, ...]:
    """Update the balance bias of every router in this process's stages, unless ``ok`` is false. The
    bias is overwritten in place, as the optimizer overwrites weights.

    ``reports``: the reports of a step, by stage; ``load`` is the load of each layer's experts.
    ``rate``: the size of a bias step; 0: no update."""
    if not rate:
        return params
    for stage, tree in zip(pipe.stages, params, strict=True):
        biases = [p.moe.router.balance for p in tree.all_blocks if p.moe is not None]
        for bias, load_E in zip(biases, reports[stage]["load"] if biases else [], strict=True):
            step = bias_step(load_E, rate)
            step = step if ok is None else torch.where(ok, step, 0)
            to_local(bias).add_(step.to(bias.dtype))
    return params
