"""AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) on local shards, global-norm clipping, learning-rate
schedules.

The update is elementwise, so it never needs to know that a weight is sharded: it runs on each rank's own part
in one fused kernel for the whole tree. Only the gradient norm looks across ranks: each rank sums the squares
it holds, each square divided by the number of ranks that hold it too, and one all-reduce per mesh axis gives
the exact global norm.

``adam_update`` consumes its arguments: gradients, params and state are overwritten in place, as if donated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial

from dtron.config import OptimConfig
from dtron.dtensor import full, local
from dtron.params import flat, tree_map


@dataclass(frozen=True)
class AdamState:
    """First and second moments, trees like the params; ``step`` counts updates."""

    step: int
    m: Any
    v: Any


def adam_init(params: Any) -> AdamState:
    return AdamState(0, tree_map(torch.zeros_like, params), tree_map(torch.zeros_like, params))


def adam_update(
    grads: Any, state: AdamState, params: Any, spec: Any, lr: float, scale: float, config: OptimConfig
) -> tuple[Any, AdamState]:
    """One AdamW step with ``grads * scale``. ``spec`` (the declared tree) says which weights decay."""
    step = state.step + 1
    for decays in (True, False):
        chosen = [i for i, w in enumerate(flat(spec)) if w.decays == decays]
        if not chosen:
            continue
        p, g, m, v = ([local(flat(tree)[i]) for i in chosen] for tree in (params, grads, state.m, state.v))
        if scale != 1.0:
            torch._foreach_mul_(g, scale)
        torch._fused_adamw_(
            p,
            # The fused kernel walks memory without looking at strides, and an uneven shard's gradient is a
            # slice of its padded buffer.
            [x.to(y.dtype).contiguous() for x, y in zip(g, p, strict=True)],
            m,
            v,
            [],
            [torch.full((), float(step), device=x.device) for x in p],
            lr=lr,
            beta1=config.beta1,
            beta2=config.beta2,
            weight_decay=config.weight_decay if decays else 0.0,
            eps=config.eps,
            amsgrad=False,
            maximize=False,
        )
    return params, AdamState(step, state.m, state.v)


def global_norm(grads: Any, spec: Any = None, over_stages: Callable[[float], float] = lambda x: x) -> float:
    """The Euclidean norm of the whole gradient, exact on every mesh; float64 where the gradients are. With
    ``spec``, twins are left out; ``over_stages`` adds a number up over the pipeline ranks."""
    total, mesh = None, None
    twins = [False] * len(flat(grads)) if spec is None else [w.twin for w in flat(spec)]
    for g, twin in zip(flat(grads), twins, strict=True):
        if twin:
            continue
        square = local(g).to(torch.promote_types(g.dtype, torch.float32)).square().sum()
        if isinstance(g, DTensor):
            mesh = g.device_mesh
            square = square / math.prod(
                n for n, p in zip(mesh.shape, g.placements, strict=True) if not p.is_shard()
            )
        total = square if total is None else total + square
    if mesh is not None:
        total = DTensor.from_local(total, mesh, [Partial()] * mesh.ndim, run_check=False)
    return math.sqrt(over_stages(full(total).item()))


def clip_scale(norm: float, limit: float) -> float:
    return min(1.0, limit / norm) if limit > 0 and norm > 0 else 1.0


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of update ``step`` (from 0) out of ``steps``: warm-up to ``lr``, then the schedule, which
    reaches ``min_lr * lr`` on the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    after = max(steps - config.warmup - 1, 1)
    done = min((step - config.warmup) / after, 1.0)
    match config.schedule:
        case "constant":
            share = 1.0
        case "linear":
            share = 1 - done
        case "cosine":
            share = 0.5 * (1 + math.cos(math.pi * done))
        case "wsd":
            share = min(1.0, (1 - done) / config.decay) if config.decay else 1.0
    return config.lr * (config.min_lr + (1 - config.min_lr) * share)
