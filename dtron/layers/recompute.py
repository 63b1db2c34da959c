"""Run a block: all-gather its weights, and select the activations that backward recomputes.

Recompute (Chen et al. 2016, arXiv:1604.06174; selective: Korthikanti et al. 2022, arXiv:2205.05198,
section 5): ``full`` keeps a block's input and runs the block again in backward. ``selective`` keeps
the outputs of matmuls and attention and recomputes the cheap rest. Under ZeRO-3 a block all-gathers
its weights inside, and no gathered weight may stay in memory until backward. So under ZeRO-3 a
block is always a recomputed region. ``none`` then means: keep everything but the gathered weights.
(In a compiled block, copies that only a kernel needs are not kept either: see
``recompute_in_backward``.)

Under ``full`` only one block at a time has its activations in memory. Its widest tensors are the
ones between the matmuls of its feed-forward layer, ``[T, F]``. This layer processes each token
independently. So at long sequences it runs one chunk of tokens at a time, and each chunk is a
recomputed region of its own. No tensor of size ``[T, F]`` ever exists.
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
    """Run ``block(p, x_TD, load_E)`` with its weights all-gathered. ``narrow``: the rule for
    weights that may be gathered in 8 bits."""
    whole = partial(gather, layout=layout, narrow=narrow)

    def run(p: Any, x_TD: Tensor) -> tuple[Tensor, ...]:
        # ZeRO-3: an all-gather over dp and cp. Otherwise there is nothing left to do.
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
        return run_gathered(p, x_TD)  # the compiler selects what else to keep
    kept = _AllKept()
    return _region(
        run_all_kept, p, x_TD, context_fn=partial(create_selective_checkpoint_contexts, kept)
    )


def run_end(fn: Callable, p: Any, x_TD: Tensor, recompute: str) -> Tensor:
    """Run ``fn(p, x_TD)``, the layer after the last block. Under ``full`` it is a recomputed region
    of its own. So the last block's output is kept as the input of this region, just as every other
    block's output is kept as the input of the next block. Otherwise a compiler would recompute this
    output, and so the whole last matmul of the block, before the rest of the block's backward."""
    return _region(fn, p, x_TD) if recompute == "full" and torch.is_grad_enabled() else fn(p, x_TD)


def recompute_in_backward(fn: Callable, *xs: Tensor) -> tuple[Tensor, ...]:
    """Return ``fn(*xs)``, and let a compiled backward recompute these results from xs. By default a
    compiler keeps the inputs of matmuls and attention."""
    return (
        _region(fn, *xs) if torch.compiler.is_compiling() and torch.is_grad_enabled() else fn(*xs)
    )


def mlp_chunk_tokens(recompute: str, tokens: int, width: int) -> int | None:
    """Return the number of a rank's tokens that the feed-forward layer takes at once; None: all.
    ``width``: the width of the rank's shard of the layer.

    The layer runs in chunks only under ``full``, and only if a tensor between the matmuls has more
    than 2^27 elements (256 MiB in bfloat16). There are at most 8 chunks: each chunk adds one more
    copy of every operation to compile, and an eighth of F is less than the residual stream's D.
    Chunk sizes are multiples of 128, because FP8 and fast kernels want them."""
    chunks = min(8, -(-tokens * width // 2**27)) if recompute == "full" else 1
    return -(-tokens // chunks // 128) * 128 if chunks > 1 else None


def in_chunks(fn: Callable, size: int) -> Callable:
    """Make ``fn(x, *weights)`` run on ``size`` rows of x at a time. ``fn`` must treat every row
    independently. Each chunk keeps only its x, and is recomputed in backward. Rank-local: takes no
    DTensors."""

    def run(x: Tensor, *weights: Tensor | None) -> Tensor:
        # A weight's gradient is a sum over chunks. The chunks use a wider copy of the weight, so
        # this sum is accumulated in float32. Casting a weight to the wider dtype and back does not
        # change the weight, and a compiler removes both casts.
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
    # flex_attention, an operator that takes functions, has no schema.
    schema = getattr(op, "_schema", None)
    return schema is not None and any(out.alias_info is not None for out in schema.returns)


def _matmuls(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    """Selective: keep the outputs of matmuls and attention."""
    keep = getattr(op, "overloadpacket", op).__name__.startswith(_MATMULS) and not _is_view(op)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


class _AllKept:
    """Keep everything but gathered weights and views (a view may be of a gathered weight)."""

    def __init__(self):
        self.gathering = False

    def __call__(self, ctx, op, *args, **kwargs) -> CheckpointPolicy:
        keep = not self.gathering and not _is_view(op)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
