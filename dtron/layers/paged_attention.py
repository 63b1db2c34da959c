"""Attention that reads the pages of the KV cache where they are (Kwon et al. 2023,
arXiv:2309.06180, section 4.3).

``recall`` of kv_cache.py copies all pages of a row to attend to them, so each key and each value
moves three times. Here flex_attention takes the whole pool as one row of keys, and its block mask
is the block table: the blocks of keys of a row are the row's pages. No key is copied, and pages of
other rows are not read. The kernel for decoding divides the pages of a row among many processors
(flash-decoding, Dao et al. 2023).

The mask needs the place of a key in its row, and the kernel knows its place in the pool. ``order``
is the inverse of the block tables.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dtron.layers.attention_kernels import by_itself, run_flex, with_sinks
from dtron.layers.attention_mask import AttentionMask, FlexBlocks, sees
from dtron.layers.kv_cache import Past, write

NOT_IN_ROW = -1


@dataclass(frozen=True)
class PageRule:
    """The rule of a mask for the keys of a pool, like ``MaskRule``.

    ``mask``: its ``queries [B, S]`` are the places of the queries in their rows.
    ``order_BP``: see ``page_order``.
    ``page``: the number of tokens of a page."""

    mask: AttentionMask
    order_BP: Tensor
    page: int

    def __call__(self, b: Tensor, n: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Return whether query i of row b may see key j of the pool."""
        assert self.mask.queries is not None
        place = self.order_BP[b, j // self.page]
        key = place * self.page + j % self.page
        return (place != NOT_IN_ROW) & sees(self.mask, None, b, self.mask.queries[b, i], key)


def page_order(table_BP: Tensor, pages: int) -> Tensor:
    """Return the place of each page of the pool in the block table of each row, ``[B, pages]``;
    ``NOT_IN_ROW`` for pages of other rows and for the null page."""
    places = torch.arange(table_BP.shape[1], device=table_BP.device, dtype=torch.int32)
    order = torch.full((len(table_BP), pages), NOT_IN_ROW, device=table_BP.device).int()
    order = order.scatter(1, table_BP, places.expand(table_BP.shape))
    order[:, 0] = NOT_IN_ROW
    return order


def attend_to_pages(
    q: Tensor, k: Tensor, v: Tensor, sinks_N: Tensor | None, past: Past, mask: AttentionMask
) -> Tensor:
    """Write the new ``k`` and ``v [T, K, H]`` into their slots, and attend to the pages of each
    row: ``q [B, N, S, H]`` -> the same shape. Rank-local."""
    table_BP, order_BP, pages = past.table_BP, past.order_BP, past.k_PSKH
    assert table_BP is not None and order_BP is not None and pages is not None
    assert past.positions_T is not None and past.v_PSKH is not None
    write(k, v, past)
    page, queries = pages.shape[1], past.positions_T.unflatten(0, (-1, mask.seq_len))
    whole = replace(mask, seq_len=table_BP.shape[1] * page, queries=queries)
    used_B = queries.amax(1) // page + 1
    values = {
        "seq_lengths": (mask.seq_len, pages.shape[0] * page),
        "kv_num_blocks": used_B.int()[:, None, None],
        "kv_indices": table_BP.int()[:, None, None],
        **dict.fromkeys(("full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices")),
        **dict.fromkeys(("full_q_num_blocks", "full_q_indices")),
        "BLOCK_SIZE": (max(mask.seq_len, 128), page),
    }
    whole = replace(whole, blocks=FlexBlocks(values, PageRule(whole, order_BP, page)))
    keys, vals = (x.flatten(0, 1).transpose(0, 1)[None] for x in (pages, past.v_PSKH))
    o, lse = by_itself(run_flex, q.device)(q, keys, vals, whole, sinks_N is not None, "AUTO")
    return o if sinks_N is None else with_sinks(o, lse, sinks_N)
