"""KV cache: keys and values of earlier tokens, so that generating a token computes only one token.

A row of the cache has a slot for every position, and a key is stored in the slot of its position.
So rows of unequal lengths need no left padding and no bookkeeping. A query sees the slots up to its
own position, by the rule ``sees`` of attention_mask.py. The content of later slots is
overwritten before any query sees it.

The layers are the same as in training. They pass the cache to the core of attention together with
the new keys, the new values and their positions. The core writes them into their slots and attends
to all of them. The cache is updated in place, like an optimizer's moments: a copy per token would
cost as much as reading the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dtron.layers.attention_mask import AttentionMask
from dtron.mesh import Layout


@dataclass(frozen=True)
class KVCache:
    """The cache of one layer.

    ``k_TKH``, ``v_TKH``: ``[rows * slots @tokens, K@kv_heads, H]`` (in latent attention all
        heads)."""

    k_TKH: Tensor
    v_TKH: Tensor


class Past(NamedTuple):
    """Keys and values of earlier tokens in generation, as arguments of a local region (None: no
    cache).

    ``k_TKH``, ``v_TKH``: see ``KVCache``.
    ``slots_T``: the slots of the new tokens."""

    k_TKH: Tensor | None = None
    v_TKH: Tensor | None = None
    slots_T: Tensor | None = None


def empty_kv_cache(
    rows: int,
    slots: int,
    heads: int,
    widths: tuple[int, int],
    axis: str,
    layout: Layout,
    dtype: torch.dtype,
    device: str,
) -> KVCache:
    """Make an empty cache for ``rows`` rows over all ranks, sharded into ``layout.parts("tokens")``
    equal shards.

    ``widths``: the width of a head's keys, and the width of its values.
    ``axis``: the logical axis of the heads of keys and values."""
    tokens, own = rows * slots // layout.parts("tokens"), heads // layout.parts(axis)
    zeros = [torch.zeros(tokens, own, width, dtype=dtype, device=device) for width in widths]
    return KVCache(*(layout.from_local(x, "tokens", axis, None) for x in zeros))


def recall(
    k: Tensor, v: Tensor, past: Past, mask: AttentionMask
) -> tuple[Tensor, Tensor, AttentionMask]:
    """Write the new ``k`` and ``v [T, K, H]`` into their slots. Return all keys and all values,
    ``[B, K, slots, H]`` each, and the mask for queries in the new tokens' slots. Rank-local."""
    slots_T, k_TKH, v_TKH = past.slots_T, past.k_TKH, past.v_TKH
    assert slots_T is not None and k_TKH is not None and v_TKH is not None
    slots_BS = slots_T.unflatten(0, (-1, mask.seq_len))
    rows = torch.arange(len(slots_BS), device=k.device)[:, None]
    updated = []
    for new, cache in ((k, k_TKH), (v, v_TKH)):
        cache = cache.unflatten(0, (len(slots_BS), -1))
        cache[rows, slots_BS] = new.unflatten(0, (-1, mask.seq_len)).to(cache.dtype)
        updated.append(cache.transpose(1, 2))
    k, v = updated
    return k, v, replace(mask, seq_len=k.shape[2], queries=slots_BS)
