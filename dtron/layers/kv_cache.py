"""Keys and values of the tokens before, so that generating a token computes one token.

A row of the cache has a slot for every position, and a key lies in the slot of its position. So
rows of unequal lengths need no padding on the left and no bookkeeping: a query sees the slots up to
its own position, which is the one rule of cores.py, and whatever lies in later slots is overwritten
before it is seen.

The layers are those of training. They hand this to the core of attention along with the new keys
and values; the core writes those into their slots and attends to all of them. The cache is written
in place, like an optimizer's moments: a copy per token would cost as much as reading it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dtron.layers.attention_kernels import AttentionMask
from dtron.mesh import Layout


@dataclass(frozen=True)
class KVCache:
    """Of one layer: ``k_TKH`` and ``v_TKH`` ``[rows * slots @tokens, K@kv_heads, H]`` (in latent
    attention all heads), and ``places_T [T@tokens]``, the positions of the new tokens (None between
    steps)."""

    k_TKH: Tensor
    v_TKH: Tensor
    places_T: Tensor | None = None


def empty_past(
    rows: int,
    slots: int,
    heads: int,
    widths: tuple[int, int],
    axis: str,
    layout: Layout,
    dtype: torch.dtype,
    device: str,
) -> KVCache:
    """For ``rows`` over all ranks, each in ``layout.parts("tokens")`` equal parts. ``widths``: of a
    head's keys and values; ``axis``: the logical axis of their heads."""
    tokens, own = rows * slots // layout.parts("tokens"), heads // layout.parts(axis)
    zeros = lambda width: torch.zeros(tokens, own, width, dtype=dtype, device=device)
    return KVCache(*(layout.from_local(zeros(width), "tokens", axis, None) for width in widths))


def recall(
    k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, places_T: Tensor, mask: AttentionMask
) -> tuple[Tensor, Tensor, AttentionMask]:
    """Rank-local: write the new ``k`` and ``v [T, K, H]`` into their slots. Returns all ``[B, K,
    slots, H]`` of them, and the mask for queries at these places."""
    places_BS = places_T.unflatten(0, (-1, mask.sequence))
    rows = torch.arange(len(places_BS), device=k.device)[:, None]
    found = []
    for new, past in ((k, past_k), (v, past_v)):
        past = past.unflatten(0, (len(places_BS), -1))
        past[rows, places_BS] = new.unflatten(0, (-1, mask.sequence)).to(past.dtype)
        found.append(past.transpose(1, 2))
    k, v = found
    return k, v, replace(mask, sequence=k.shape[2], queries=places_BS)
