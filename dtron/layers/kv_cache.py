"""Paged KV cache (Kwon et al. 2023, arXiv:2309.06180, section 4): keys and values of earlier
tokens, so that generating a token computes only one token.

The cache is a pool of pages of a fixed number of tokens, which all rows share. A row's *block
table* names its pages in order: the token at position p is in entry p // page of the table, at
offset p % page. So a row takes memory for the tokens that it has, and not for the tokens that it
may have. A query sees the tokens up to its own position, by the rule ``sees`` of attention_mask.py.
Entries of the table after a row's last page, and the content of a page after its last token, are
never seen.

A rank of data parallelism has its own pool and its own rows. Page numbers count a rank's own pages.
Page 0 of each pool is the *null page*: padding is written into it, and nobody reads it.

The layers are the same as in training. They pass the cache to the core of attention together with
the new keys, the new values and their slots. The core writes them into their slots and attends to
all of a row. The cache is updated in place, like an optimizer's moments: a copy per token would
cost as much as reading the cache. All shapes are known on the host: no kernel waits for a number.
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

    ``k_PSKH``, ``v_PSKH``: the pages, ``[pages@tokens, page, K@kv_heads, H]``. No ``v_PSKH``: the
        values are the first channels of the keys, as in latent attention (mla_decoding.py).
    ``slots_T [T@tokens]``: the slots of the new tokens: page * page size + offset.
    ``table_BP [B@tokens, P]``: the block tables of the rows (None: no row has earlier tokens, so
        the new ones see each other alone).
    ``order_BP [B@tokens, pages]``: the inverse of the block tables, see paged_attention.py. Only
        there are pages read in their places (None: they are copied)."""

    k_PSKH: Tensor
    v_PSKH: Tensor | None
    slots_T: Tensor | None = None
    table_BP: Tensor | None = None
    order_BP: Tensor | None = None


class Past(NamedTuple):
    """Keys and values of earlier tokens in generation, as arguments of a local region (None: no
    cache). The first fields are those of ``KVCache``.

    ``positions_T``: the positions of the new tokens in their rows."""

    k_PSKH: Tensor | None = None
    v_PSKH: Tensor | None = None
    slots_T: Tensor | None = None
    table_BP: Tensor | None = None
    order_BP: Tensor | None = None
    positions_T: Tensor | None = None


def past_axes(axis: str | None) -> tuple[tuple[str | None, ...], ...]:
    """Return the axes of the fields of ``Past``.

    ``axis``: the logical axis of the heads of keys and values (None: every rank has them all)."""
    pages = ("tokens", None, axis, None)
    return pages, pages, ("tokens",), ("tokens", None), ("tokens", None), ("tokens",)


def empty_kv_cache(
    pages: int,
    page: int,
    heads: int,
    widths: tuple[int, int],
    axis: str,
    layout: Layout,
    dtype: torch.dtype,
    device: str,
) -> KVCache:
    """Make an empty cache of ``pages`` pages over all ranks, sharded into
    ``layout.parts("tokens")`` equal shards.

    ``page``: the number of tokens of a page.
    ``widths``: the width of a head's keys, and the width of its values.
    ``axis``: the logical axis of the heads of keys and values."""
    shape = pages // layout.parts("tokens"), page, heads // layout.parts(axis)
    zeros = [torch.zeros(*shape, width, dtype=dtype, device=device) for width in widths]
    return KVCache(*(layout.from_local(x, "tokens", None, axis, None) for x in zeros))


def write(k: Tensor, v: Tensor, past: Past) -> None:
    """Write the new ``k`` and ``v [T, K, H]`` into their slots. Rank-local."""
    assert past.slots_T is not None
    for new, pages in ((k, past.k_PSKH), (v, past.v_PSKH)):
        if pages is not None:
            # Not through a view of the pages: torch 2.11's compiler would copy the whole pool.
            page = pages.shape[1]
            pages[past.slots_T // page, past.slots_T % page] = new.to(pages.dtype)


def recall(
    k: Tensor, v: Tensor, past: Past, mask: AttentionMask
) -> tuple[Tensor, Tensor, AttentionMask]:
    """Write the new ``k`` and ``v [T, K, H]`` into their slots. Return the keys and the values of
    each row's pages in order, ``[B, K, S, H]`` each with S = P * page, and the mask for queries at
    the new tokens' positions. Rank-local."""
    table_BP, positions_T = past.table_BP, past.positions_T
    assert table_BP is not None and positions_T is not None
    write(k, v, past)
    of_rows: list[Tensor] = []
    for pages in (past.k_PSKH, past.v_PSKH):
        if pages is None:  # the values are in the keys
            of_rows.append(of_rows[0][..., : v.shape[-1]])
            continue
        # On a CPU, index_select is faster than pages[table_BP].
        of_row = pages.index_select(0, table_BP.flatten()).unflatten(0, table_BP.shape)
        of_rows.append(of_row.flatten(1, 2).transpose(1, 2))
    k, v = of_rows
    queries = positions_T.unflatten(0, (-1, mask.seq_len))
    return k, v, replace(mask, seq_len=k.shape[2], queries=queries)
