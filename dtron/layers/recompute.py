"""Recompute inside a layer: regions whose activations backward recomputes.

An activation policy chooses the activations that a whole block keeps for backward: see
model/activation_checkpoint.py.

Where backward runs a block again, only one block at a time has its activations in memory. The
block's widest tensors stand between the matmuls of the feed-forward layer: ``[T, F]``. This layer
processes each token independently. So at long sequences it runs one chunk of tokens at a time, and
each chunk is a recomputed region of its own. No tensor of size ``[T, F]`` ever exists.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import traceback
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, noop_context_fn

from dtron.torch_compile import tracing
from dtron.tree import tree_map


def checkpointed(fn: Callable, *xs: Any, context_fn: Callable = noop_context_fn) -> Any:
    """Run ``fn(*xs)`` as a recomputed region: only ``xs`` are kept, and backward runs ``fn`` again.

    ``context_fn``: as of ``torch.utils.checkpoint``, for a region that keeps some results."""
    if tracing():
        return _marked(fn, xs, context_fn)
    return checkpoint(fn, *xs, use_reentrant=False, preserve_rng_state=False, context_fn=context_fn)


def _marked(fn: Callable, xs: tuple[Any, ...], context_fn: Callable) -> Any:
    """Run ``fn(*xs)`` under a tracer, and mark its operators. The partitioner then lets backward
    recompute them. torch.compile sets the same marks."""
    region, (context, _) = next(_REGIONS), context_fn()
    if hasattr(context, "ac_graph_id"):  # torch 2.13 marks the operators of such a context itself
        context.ac_graph_id = region
    with traceback.preserve_node_meta(), context:
        mark = {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": region}
        traceback.current_meta.update(mark)
        return fn(*xs)


_REGIONS = itertools.count()  # the partitioner keeps the tensors that one region passes to another


def recompute_in_backward(fn: Callable, *xs: Tensor) -> tuple[Tensor, ...]:
    """Return ``fn(*xs)``, and let a compiled backward recompute these results from xs. By default a
    compiler keeps the inputs of matmuls and attention."""
    marked = tracing() and torch.is_grad_enabled()
    return checkpointed(fn, *xs) if marked else fn(*xs)


def mlp_chunk_tokens(tokens: int, width: int) -> int | None:
    """Return the number of a rank's tokens that the feed-forward layer takes at once; None: all.

    The layer runs in chunks only if a tensor between the matmuls has more than 2^27 elements (256
    MiB in bfloat16). There are at most 8 chunks: each chunk adds one more copy of every operation
    to compile, and an eighth of F is less than the residual stream's D. Chunk sizes are multiples
    of 128, which FP8 and fast kernels need.

    ``tokens``: the number of the rank's tokens.
    ``width``: the width of the rank's shard of the layer."""
    chunks = min(8, -(-tokens * width // 2**27))
    return -(-tokens // chunks // 128) * 128 if chunks > 1 else None


def in_chunks(fn: Callable, size: int) -> Callable:
    """Make ``fn(x, *weights)`` run on ``size`` rows of x at a time. ``fn`` must process every row
    independently. Each chunk keeps only its x for backward, which recomputes the rest. Rank-local:
    takes no DTensors."""

    def run(x: Tensor, *weights: Any) -> Tensor:
        # A weight's gradient is a sum over chunks. The chunks use a wider copy of the weight, so
        # this sum is accumulated in float32. Casting a weight to the wider dtype and back does not
        # change the weight, and a compiler removes both casts.
        wide = tree_map(lambda w: w.to(_at_least_float32(w.dtype)), weights)

        def chunk(x: Tensor, *wide: Any) -> Tensor:
            return fn(x, *tree_map(lambda w, narrow: w.to(narrow.dtype), wide, weights))

        each = partial(checkpointed, chunk) if torch.is_grad_enabled() else chunk
        return torch.cat([each(rows, *wide) for rows in x.split(size)])

    return run


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
