"""AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) on local shards.

The update is elementwise, so it does not depend on sharding: it runs on each rank's local shards in
one fused kernel for the whole tree.

The model computes in fewer bits (bfloat16); the optimizer updates master weights (float32). The
optimizer state keeps a copy of every weight in the compute dtype. The update writes it in the same
pass as the master. Otherwise each step would read all masters again just to cast them: 4 of the 32
bytes that a step moves per weight.

``adam_update`` overwrites its arguments in place, as if donated: gradients, params and state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dtron.distributed.redistribute import cast, local
from dtron.distributed.simulated_ranks import is_simulated
from dtron.distributed.symmetric_memory import publish_weights, to_symmetric_memory
from dtron.params import flat, tree_map, unflatten
from dtron.training.optim_config import OptimConfig


@dataclass(frozen=True)
class AdamState:
    """The state of AdamW.

    ``step``: the number of updates.
    ``m``, ``v``: first and second moments, trees like the params.
    ``copies``: the params in the compute dtype, or None if that is their own dtype. A checkpoint
    does not contain them."""

    step: int
    m: Any
    v: Any
    copies: Any = None


def adam_init(params: Any) -> AdamState:
    return AdamState(0, tree_map(torch.zeros_like, params), tree_map(torch.zeros_like, params))


def with_compute_copies(
    state: AdamState, params: Any, spec: Any, dtype: torch.dtype | None
) -> AdamState:
    """The state with copies of the params in ``dtype`` (None: without copies). If copy engines
    all-gather the weights, the copies are in symmetric memory, where other ranks can read them
    (distributed/symmetric_memory.py). Frozen weights are not cast."""
    if dtype is None:
        return replace(state, copies=None)
    copy = lambda w, p: p if w.frozen else cast(p, dtype)
    return replace(
        state, copies=unflatten(params, to_symmetric_memory(flat(tree_map(copy, spec, params))))
    )


UpdateFn = Callable[..., None]


def adam_update(
    grads: Any,
    state: AdamState,
    params: Any,
    spec: Any,
    lr: float | Tensor,
    scale: float | Tensor,
    config: OptimConfig,
    rule: UpdateFn | None = None,
    number: Tensor | None = None,
    ok: Tensor | None = None,
) -> tuple[Any, AdamState]:
    """One AdamW step with ``grads * scale``.

    ``spec``: the declared tree. It says which weights decay, and which are frozen.
    ``lr``, ``scale``: numbers or tensors.
    ``rule``: the update of lists of local tensors. None: ``fused``; or ``written_out``, compiled.
    ``number``: the number of this update, as a tensor; None: one more than ``state.step``.
    ``ok``: if false, no weight and no moment changes, but the update is counted.

    Tensors among these arguments stay on the device: the host does not wait for them."""
    step, rule = state.step + 1, rule or fused
    decays = [None if w.frozen else w.decays for w in flat(spec)]
    trees = [flat(tree) for tree in (params, grads, state.m, state.v)]
    trees.append([None] * len(decays) if state.copies is None else flat(state.copies))
    for wanted in (True, False):
        chosen = ([x for x, d in zip(xs, decays, strict=True) if d is wanted] for xs in trees)
        p, g, m, v, c = ([x if x is None else local(x) for x in xs] for xs in chosen)
        if p:
            factor = torch.as_tensor(scale, dtype=p[0].dtype, device=p[0].device)
            decay = config.weight_decay if wanted else 0.0
            sure = torch.ones((), dtype=torch.bool, device=p[0].device) if ok is None else ok
            rule(p, g, m, v, c, step if number is None else number, lr, factor, sure, decay, config)
    publish_weights(flat(params))
    return params, replace(state, step=step)


def fused(
    p: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    c: list[Tensor | None],
    step: int,
    lr: float,
    scale: Tensor,
    ok: Tensor,
    weight_decay: float,
    config: OptimConfig,
) -> None:
    """Update all weights at once with torch's fused AdamW kernel."""
    # The kernel ignores strides, and the gradient of an uneven shard is a slice of its padded
    # buffer. And the kernel divides gradients (``grad_scale``) in float32 only.
    g = [x.to(y.dtype).contiguous() for x, y in zip(g, p, strict=True)]
    divides = p[0].dtype == torch.float32 and not is_simulated(p[0])
    if not divides:
        torch._foreach_mul_(g, scale)
    torch._fused_adamw_(
        p, g, m, v, [], [torch.full((), float(step), device=x.device) for x in p],
        lr=lr, beta1=config.beta1, beta2=config.beta2, weight_decay=weight_decay, eps=config.eps,
        amsgrad=False, maximize=False, grad_scale=1 / scale if divides else None,
        found_inf=(~ok).to(torch.float32),
    )  # fmt: skip
    pairs = [(y, x) for y, x in zip(c, p, strict=True) if y is not None]
    if pairs:
        torch._foreach_copy_(*zip(*pairs, strict=True))


def written_out(
    p: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    c: list[Tensor | None],
    step: int | Tensor,
    lr: float | Tensor,
    scale: Tensor,
    ok: Tensor,
    weight_decay: float,
    config: OptimConfig,
    each: Callable | None = None,
) -> None:
    """The same update as ``fused``, written out (algorithm 2 of the paper).

    ``each``: ``adamw``, compiled. Then the update is one kernel per weight and takes gradients in
    any dtype, so no gradient has to be cast before."""
    here = lambda x: x.to(scale) if isinstance(x, Tensor) else torch.full_like(scale, float(x))
    rate, corrected = here(lr), here(step)
    c1, c2 = 1 - config.beta1**corrected, 1 - config.beta2**corrected
    rest = (rate, scale, ok, c1, c2, weight_decay, config.beta1, config.beta2, config.eps)
    # At most two dims, so that fewer shapes are compiled.
    plain = lambda x: x if x is None or x.ndim < 3 else x.flatten(1)
    for one in zip(p, g, m, v, c, strict=True):
        (each or adamw)(*map(plain, one), *rest)


def adamw(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    c: Tensor | None,
    lr: Tensor,
    scale: Tensor,
    ok: Tensor,
    c1: Tensor,
    c2: Tensor,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """AdamW's arithmetic for one weight, in place.

    ``c``: the copy of ``p`` in the compute dtype, or None.
    ``ok``: if false, nothing changes.
    ``c1``, ``c2``: the bias corrections of the moments."""
    g = g.to(p.dtype) * scale
    m_new = beta1 * m + (1 - beta1) * g
    v_new = beta2 * v + (1 - beta2) * g * g
    p_new = p * (1 - lr * weight_decay) - lr * (m_new / c1) / ((v_new / c2).sqrt() + eps)
    for old, new in ((p, p_new), (m, m_new), (v, v_new)):
        old.copy_(torch.where(ok, new, old))
    if c is not None:
        c.copy_(p)
