"""Where the weights of a block are gathered, and what of it is computed again in backward.

Recompute (Chen et al. 2016, arXiv:1604.06174; selective: Korthikanti et al. 2022, arXiv:2205.05198,
section 5): ``full`` keeps a block's input and runs it again in backward; ``selective`` keeps the
outputs of matrix products and attention and redoes the cheap rest. Under ZeRO-3 a block gathers its
weights inside, and no gathered weight may wait for backward: so a block is always a recomputed
region there, and ``none`` then means that everything but the gathers is kept. (Compiled, copies
that only a kernel asks for are not kept either: ``recompute_in_backward``.)

What ``full`` leaves is one block at work, and in it the widest tensors are those between the
products of its feed-forward layer, ``[T, F]``. This layer knows no neighbours, so at long sequences
it runs a chunk of tokens at a time, each chunk a recomputed region of its own: nothing of size
``[T, F]`` ever exists.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from dtron.mesh import Layout
from dtron.params import Fp8GatherRule, declared, flat, gather, gather_all, unflatten


def run_block(
    block: Callable,
    p: Any,
    x_TD: Tensor,
    load_E: Tensor | None,
    layout: Layout,
    recompute: str,
    narrow: Fp8GatherRule | None = None,
) -> tuple[Tensor, ...]:
    """``block(p, x_TD, load_E)`` with its weights gathered; ``narrow``: which of them may be in 8
    bits."""
    whole = partial(gather, layout=layout, narrow=narrow)

    def run(p: Any, x_TD: Tensor) -> tuple[Tensor, ...]:
        # ZeRO-3: an all-gather over dp and cp; otherwise nothing is left to do.
        return block(whole(p), x_TD, load_E)

    def run_all_kept(p: Any, x_TD: Tensor) -> tuple[Tensor, ...]:
        kept.gathering = True
        p = whole(p)
        kept.gathering = False
        return block(p, x_TD, load_E)

    def run_gathered(p: Any, x_TD: Tensor) -> tuple[Tensor, ...]:
        one_by_one = lambda *ws: tuple(gather_all(ws, declared(p), layout, narrow=narrow))
        gathered = recompute_in_backward(one_by_one, *flat(p))
        return block(unflatten(p, list(gathered)), x_TD, load_E)

    if not torch.is_grad_enabled():
        return run(p, x_TD)
    if recompute == "full":
        return _region(run, p, x_TD)
    if recompute == "selective":
        return _region(
            run, p, x_TD, context_fn=partial(create_selective_checkpoint_contexts, _matmuls)
        )
    if not any(layout.gathers(w, *d.axes) for w, d in zip(flat(p), declared(p), strict=True)):
        return run(p, x_TD)
    if torch.compiler.is_compiling():
        return run_gathered(p, x_TD)  # what else to keep, a compiler decides by itself
    kept = _AllKept()
    return _region(
        run_all_kept, p, x_TD, context_fn=partial(create_selective_checkpoint_contexts, kept)
    )


def run_end(fn: Callable, p: Any, x_TD: Tensor, recompute: str) -> Tensor:
    """``fn(p, x_TD)``, what follows the last block. Under ``full`` a region of its own, so that the
    output of that block is kept for it, as that of any other is for the next. A compiler would make
    it again instead, and for that all of the last product of the block, before the rest of its
    backward."""
    return _region(fn, p, x_TD) if recompute == "full" and torch.is_grad_enabled() else fn(p, x_TD)


def recompute_in_backward(fn: Callable, *xs: Tensor) -> tuple[Tensor, ...]:
    """``fn(*xs)``, whose results a compiled backward is to make again from xs. By itself a compiler
    keeps what a product or attention takes."""
    return (
        _region(fn, *xs) if torch.compiler.is_compiling() and torch.is_grad_enabled() else fn(*xs)
    )


def mlp_chunk_tokens(recompute: str, tokens: int, width: int) -> int | None:
    """How many of a rank's tokens its part of a feed-forward layer, ``width`` wide, takes at once;
    None: all. Chunks, and only under ``full``, as soon as a tensor between the products has more
    than 2^27 elements (256 MiB in bfloat16), and at most 8: each is one more of everything to
    compile, and an eighth of F is less than the residual stream's D. Multiples of 128, because FP8
    and fast kernels want them."""
    chunks = min(8, -(-tokens * width // 2**27)) if recompute == "full" else 1
    return -(-tokens // chunks // 128) * 128 if chunks > 1 else None


def in_chunks(fn: Callable, size: int) -> Callable:
    """``fn(x, *weights)``, whose rows have nothing to do with each other, on ``size`` rows at a
    time; each chunk keeps x alone, and runs again in backward. Rank-local: no DTensors."""

    def run(x: Tensor, *weights: Tensor | None) -> Tensor:
        # The gradient of a weight is a sum over chunks: of a wider copy, so that it is added up in
        # float32. Back and forth changes no weight, and a compiler leaves it out.
        wide = [
            w if w is None else w.to(torch.promote_types(w.dtype, torch.float32)) for w in weights
        ]
        narrow = lambda ws: (
            w if w is None else w.to(of.dtype) for w, of in zip(ws, weights, strict=True)
        )
        chunk = lambda x, *ws: fn(x, *narrow(ws))
        each = partial(_region, chunk) if torch.is_grad_enabled() else chunk
        return torch.cat([each(rows, *wide) for rows in x.split(size)])

    return run


_region = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)

_MATMULS = (
    "mm",
    "addmm",
    "bmm",
    "_scaled_mm",
    "_grouped_mm",
    "_scaled_dot_product",
    "flex_attention",
)


def _is_view(op) -> bool:
    schema = getattr(
        op, "_schema", None
    )  # flex_attention, an operator that takes functions, has none
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
