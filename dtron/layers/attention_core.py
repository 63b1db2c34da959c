"""The core of attention on a rank, for every kind of attention: own heads and own tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from dtron.layers.attention_kernels import CORES, AttentionPath, with_bias
from dtron.layers.attention_mask import AttentionMask
from dtron.layers.context_parallel import ContextParallelMask, attend, largest_of_shard
from dtron.layers.kv_cache import KVCache, Past, recall, write
from dtron.layers.mixer import MixerInputs
from dtron.layers.paged_attention import attend_to_pages
from dtron.mesh import Layout

LARGEST = ("heads", "^tokens")
"""the axes of ``largest``: each head's logit, a maximum over tokens that is pending"""


@dataclass(frozen=True, kw_only=True)
class AttentionInputs(MixerInputs):
    """The inputs of attention.

    ``mask``: the mask; a ``ContextParallelMask`` if cp shards the rows, see context_parallel.py.
    ``table_TH``: the rotary angles of each token, ``[T@tokens, H]`` (None: no rotation).
    ``path``: the kernels, see attention_kernels.py.
    ``cache``: a ``KVCache``, to which the new keys and values are added.
    ``positions_T [T@tokens]``: the positions of the tokens in their rows.
    ``query_factor_T [T@tokens]``: the factor of each token's queries (None: no factor).
    ``norm_rotated``: whether queries and keys are normalised after their rotation."""

    mask: AttentionMask | ContextParallelMask
    table_TH: Tensor | None = None
    path: AttentionPath = "auto"
    positions_T: Tensor | None = None
    query_factor_T: Tensor | None = None
    norm_rotated: bool = False

    @property
    def past(self) -> Past:
        """The cache, and where the new tokens are in it."""
        if self.cache is None:
            return Past()
        c: KVCache = self.cache
        return Past(c.k_PSKH, c.v_PSKH, c.slots_T, c.table_BP, c.order_BP, self.positions_T)


class Heads(NamedTuple):
    """Queries, keys and values of a rank's heads. Values may have another width than queries and
    keys."""

    q_TNH: Tensor
    k_TKH: Tensor
    v_TKH: Tensor


def core(
    heads: Heads,
    documents_T: Tensor | None,
    sinks_N: Tensor | None,
    past: Past,
    inputs: AttentionInputs,
    layout: Layout,
) -> Tensor:
    """Attend with a rank's own heads and its own tokens. Rank-local, except for communication over
    cp. The output is as wide as the values. With a past, rows are whole and there are no documents.
    Pages are then read in their places, or copied. In copies the mask is an explicit matrix,
    whatever the path is. Rows without earlier tokens read no page.

    ``documents_T``: ``[T@rows]``, a rank's shard.
    ``inputs``: its ``mask`` and ``path`` are used."""
    mask = inputs.mask
    if past.k_PSKH is None:
        return attend(*heads, documents_T, sinks_N, mask, layout, inputs.path)
    assert isinstance(mask, AttentionMask)  # rows are whole
    path = with_bias(mask.softcap, sinks_N is not None)
    if past.table_BP is None:
        write(heads.k_TKH, heads.v_TKH, past)
        return attend(*heads, None, sinks_N, mask, layout, path)
    q = heads.q_TNH.unflatten(0, (-1, mask.seq_len)).transpose(1, 2)
    if past.order_BP is not None and past.v_PSKH is not None:
        o = attend_to_pages(q, heads.k_TKH, heads.v_TKH, sinks_N, past, mask)
        return o.transpose(1, 2).flatten(0, 1)
    k, v, mask = recall(heads.k_TKH, heads.v_TKH, past, mask)
    attend_to_all = CORES[path]
    if sinks_N is not None:
        return attend_to_all(q, k, v, None, sinks_N, mask).transpose(1, 2).flatten(0, 1)
    # The queries of a group of heads become more queries of one head. So the cache is read once,
    # and not repeated for every query head.
    group, queries = q.shape[1] // k.shape[1], mask.queries
    assert queries is not None
    q_grouped = q.unflatten(1, (-1, group)).flatten(2, 3)
    selected = None if mask.selected is None else mask.selected.repeat(1, group, 1)
    mask = replace(mask, queries=queries.repeat(1, group), selected=selected)
    o = attend_to_all(q_grouped, k, v, None, None, mask)
    return o.unflatten(2, (group, -1)).flatten(1, 2).transpose(1, 2).flatten(0, 1)


def largest(
    heads: Heads, documents_T: Tensor | None, inputs: AttentionInputs, layout: Layout
) -> Tensor:
    """Return the largest logit of each head for a rank's own queries, ``[N]``; see
    attention_logits.py. Rank-local, except for communication over cp."""
    return largest_of_shard(heads.q_TNH, heads.k_TKH, documents_T, inputs.mask, layout)
