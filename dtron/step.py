"""One training step: loss and gradients over microbatches, and where ZeRO's three stages differ.

ZeRO (Rajbhandari et al. 2019, arXiv:1910.02054) stores each weight, its gradient and its optimizer state on
one of the dp ranks instead of on all. Here a stage is not a mode of any layer; it is *where* ``gather`` is
called and where a gradient stops being a pending sum:

    stage   weights at rest     gather               gradient over dp
    0       whole               nothing to gather    all-reduced once a step
    1       sharded over dp     once a step          stays Partial; reduce-scattered once a step
    2       sharded over dp     once a step          reduce-scattered every microbatch
    3       sharded over dp     inside each block    as 2: that is the backward of the gather

Gradients accumulate in local tensors, float32 unless asked otherwise, and everything still Partial (over
dp_replicate, cp, and tp for weights that are whole on tp ranks) is reduced once, at the end. No ``.grad`` is
set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dtron.dtensor import cast, local, reduce, scatter, shard_like
from dtron.mesh import Layout
from dtron.params import flat, gather, tree_map, unflatten


def gradients(
    loss_fn: Callable[[Any, Any], Tensor],
    params: Any,
    microbatches: Sequence[Any],
    tokens: int,
    layout: Layout,
    zero: int,
) -> tuple[Tensor, Any]:
    """``(loss, gradients)`` of ``sum(loss_fn(params, microbatch)) / tokens``.

    The loss is a scalar with its sum over data ranks pending; the gradients are a tree like params, with the
    params' placements, in the layout's reduce dtype (None: the params' own).
    """
    weights = tree_map(_leaf, params if zero == 3 else gather(params, layout))
    total, sums = None, None
    for microbatch in microbatches:
        loss = loss_fn(weights, microbatch) / tokens
        grads = torch.autograd.grad(
            loss, flat(weights), shard_like(torch.ones((), dtype=loss.dtype, device=loss.device), loss)
        )
        again = sums is None and len(microbatches) > 1  # then later ones are added in place: own the memory
        grads = [
            cast(g, layout.reduce or p.dtype, copy=again) for g, p in zip(grads, flat(params), strict=True)
        ]
        if zero == 2:
            grads = [scatter(g, p) for g, p in zip(grads, flat(params), strict=True)]
        if sums is None:
            total, sums = loss.detach(), grads
        else:
            total = total + loss.detach()
            torch._foreach_add_([local(s) for s in sums], [local(g) for g in grads])
    return total, tree_map(reduce, unflatten(params, sums), params)


def _leaf(w: Tensor) -> Tensor:
    return w.detach().requires_grad_()
