"""Where the weights of a block are gathered, and what of it is computed again in backward.

Recompute (Chen et al. 2016, arXiv:1604.06174; selective: Korthikanti et al. 2022, arXiv:2205.05198, section
5): ``full`` keeps a block's input and runs it again in backward; ``selective`` keeps the outputs of matrix
products and attention and redoes the cheap rest. Under ZeRO-3 a block gathers its weights inside, and no
gathered weight may wait for backward: so a block is always a recomputed region there, and ``none`` then means
that everything but the gathers is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dtron.mesh import Layout
from dtron.params import declared, flat, gather, gather_all, unflatten


def run_block(
    block: Callable, p: Any, x_TD: Tensor, load_E: Tensor | None, layout: Layout, recompute: str
) -> tuple[Tensor, ...]:
    """``block(p, x_TD, load_E)`` with its weights gathered."""

    def run(p: Any, x_TD: Tensor) -> tuple[Tensor, ...]:
        # ZeRO-3: an all-gather over dp; otherwise nothing is left to do.
        return block(gather(p, layout), x_TD, load_E)

    def run_all_kept(p: Any, x_TD: Tensor) -> tuple[Tensor, ...]:
        kept.gathering = True
        p = gather(p, layout)
        kept.gathering = False
        return block(p, x_TD, load_E)

    def run_gathered(p: Any, x_TD: Tensor) -> tuple[Tensor, ...]:
        gathered = region(lambda *ws: tuple(gather_all(ws, declared(p), layout)), *flat(p))
        return block(unflatten(p, list(gathered)), x_TD, load_E)

    region = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if not torch.is_grad_enabled():
        return run(p, x_TD)
    if recompute == "full":
        return region(run, p, x_TD)
    if recompute == "selective":
        return region(run, p, x_TD, context_fn=partial(create_selective_checkpoint_contexts, _matmuls))
    if not any(layout.gathers(w, *d.axes) for w, d in zip(flat(p), declared(p), strict=True)):
        return run(p, x_TD)
    if torch.compiler.is_compiling():
        return run_gathered(p, x_TD)  # what else to keep, a compiler decides by itself
    kept = _AllKept()
    return region(run_all_kept, p, x_TD, context_fn=partial(create_selective_checkpoint_contexts, kept))


_MATMULS = ("mm", "addmm", "bmm", "_scaled_mm", "_grouped_mm", "_scaled_dot_product", "flex_attention")


def _is_view(op) -> bool:
    schema = getattr(op, "_schema", None)  # flex_attention, an operator that takes functions, has none
    return schema is not None and any(out.alias_info is not None for out in schema.returns)


def _matmuls(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    """Selective: keep the outputs of matrix products and attention."""
    keep = getattr(op, "overloadpacket", op).__name__.startswith(_MATMULS) and not _is_view(op)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


class _AllKept:
    """Keep everything but gathered weights and views (of them, it may be)."""

    def __init__(self):
        self.gathering = False

    def __call__(self, ctx, op, *args, **kwargs) -> CheckpointPolicy:
        keep = not self.gathering and not _is_view(op)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
