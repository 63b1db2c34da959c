"""The lightning indexer of sparse attention (DeepSeek-V3.2, arXiv:2512.02556, section 2.1): its
weights, its scores on a mesh, the choice of keys, and its loss. sparse_attention.py explains the
layer, and index_scores.py has the operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dtron.errors import UserError
from dtron.layers.attention_core import AttentionInputs, Heads
from dtron.layers.attention_mask import AttentionMask, allowed
from dtron.layers.context_parallel import ContextParallelMask, own_queries, whole_rows
from dtron.layers.index_scores import attention_weights, divergence, index_scores, select_keys
from dtron.layers.kv_cache import KVCache
from dtron.layers.rope import rotate
from dtron.mesh import Axes, Layout
from dtron.params import ones, weight, zeros

PAIRS = ("tokens", None)
OWN_PAIRS = ("tokens_sp", None)
SUMMANDS = (*PAIRS, "+index_heads")
RowMask = AttentionMask | ContextParallelMask


@dataclass(frozen=True)
class IndexerConfig:
    """Sizes of the indexer of sparse attention, and its training."""

    heads: int = 64
    """heads of the indexer"""
    head_dim: int = 128
    """width of its heads and of its keys; the first model.mla.rope_dim dims are rotated"""
    top_k: int = 2048
    """keys that a token attends to at most"""
    loss: float = 1.0
    """weight of the indexer's loss"""
    warmup: bool = False
    """attend to all keys, while the indexer learns from all of them"""

    def __post_init__(self) -> None:
        if min(self.heads, self.head_dim, self.top_k) < 1:
            raise UserError(
                f"model.indexer heads={self.heads}, head_dim={self.head_dim}, "
                f"top_k={self.top_k}: sizes are at least 1; raise them"
            )
        if not 0 < self.loss < float("inf"):
            raise UserError(
                f"model.indexer.loss={self.loss}: the indexer learns by this loss alone, so its "
                "weight is over 0; to stop its learning, use --optim.groups '*.indexer.*: lr=0x'"
            )


@dataclass(frozen=True)
class Indexer:
    """The weights. None of these matmuls runs in FP8.

    ``w_q``: makes queries from the latent of queries.
    ``w_k``, ``k_scale``, ``k_bias``: make the key of a token, with a LayerNorm.
    ``w_heads``: makes the weights of heads."""

    w_q: Tensor = weight("q_rank", "index_heads", "index_dim", fan_in=1)
    w_k: Tensor = weight("embed", "index_dim", fan_in=1)
    k_scale: Tensor = weight("index_dim", init=ones)
    k_bias: Tensor = weight("index_dim", init=zeros)
    w_heads: Tensor = weight("embed", "act_index_heads", fan_in=1)


@dataclass(frozen=True)
class IndexedCache(KVCache):
    """Pages of latents, and pages of the indexer's keys, ``[pages@tokens, page, H]``."""

    index_PSH: Tensor | None = None


@dataclass(frozen=True)
class TokenIndex:
    """What the indexer makes of each token.

    ``q_TNH``: queries, ``[T@tokens, N@index_heads, H]``.
    ``k_TH``: the key, ``[T@tokens, H]``.
    ``w_TN``: the weights of all heads, ``[T@tokens, N]``."""

    q_TNH: Tensor
    k_TH: Tensor
    w_TN: Tensor

    def region(
        self,
        on_rank: Callable[..., Tensor],
        more: Sequence[Axes],
        inputs: AttentionInputs,
        layout: Layout,
        c: IndexerConfig,
    ) -> Callable[..., Tensor]:
        """Make a local region that computes a rank's summands of scores, ``[T@tokens, S]``.

        ``on_rank``: gets rotated queries, rotated keys, and the scaled weights of the rank's own
            heads, and then tensors with the axes of ``more``."""
        shared = ("tokens", None)
        ins = (("tokens", "index_heads", None), shared, shared, ("index_heads",), shared, *more)

        def rotated(
            q_TNH: Tensor, k_TH: Tensor, w_TN: Tensor, own_N: Tensor, table: Any, *rest: Any
        ) -> Tensor:
            if table is not None:
                q_TNH, k_TH = rotate(q_TNH, table), rotate(k_TH[:, None], table)[:, 0]
            w_TN = w_TN.to(torch.promote_types(w_TN.dtype, torch.float32)).index_select(1, own_N)
            return on_rank(q_TNH, k_TH, w_TN * (c.heads * c.head_dim) ** -0.5, *rest)

        own_N = layout.iota("index_heads", c.heads, self.q_TNH.device)
        region = layout.local_map(rotated, ins, SUMMANDS)
        return partial(region, self.q_TNH, self.k_TH, self.w_TN, own_N, inputs.table_TH)


def constant(x: Tensor) -> Tensor:
    """Return an input of the indexer: its loss must not change what the model makes of a token."""
    return x.detach()


def row_scores(
    index: TokenIndex, inputs: AttentionInputs, layout: Layout, c: IndexerConfig
) -> Tensor:
    """Return the scores of the tokens of a rank under sequence parallelism, ``[T@tokens_sp, S]``,
    with keys in the order of the row. The score is -inf if the query does not see the key."""

    def on_rank(q_TNH: Tensor, k_TH: Tensor, w_TN: Tensor, documents_T: Tensor | None) -> Tensor:
        k = in_row_order(whole_rows(k_TH, inputs.mask, layout), inputs.mask)  # all-gather over cp
        q, w = (x.unflatten(0, (len(k), -1)) for x in (q_TNH, w_TN))
        sees = visible(documents_T, inputs.mask, layout, q.device)
        return index_scores(q, k, w).masked_fill(~sees, float("-inf")).flatten(0, 1)

    scores_TS = index.region(on_rank, [("rows",)], inputs, layout, c)(inputs.documents_T)
    return layout.constrain(scores_TS, *OWN_PAIRS)  # reduce-scatter over tp


def page_scores(
    index: TokenIndex, inputs: AttentionInputs, layout: Layout, c: IndexerConfig
) -> Tensor:
    """Write the new keys into the cache. Return the scores of new tokens and all keys of their
    rows' pages, ``[T@tokens, S]``."""
    cache, mask = inputs.cache, inputs.mask
    assert isinstance(cache, IndexedCache) and isinstance(mask, AttentionMask)  # rows are whole

    def on_rank(
        q_TNH: Tensor,
        k_TH: Tensor,
        w_TN: Tensor,
        pages: Tensor,
        slots_T: Tensor,
        table_BP: Tensor,
        positions_T: Tensor,
    ) -> Tensor:
        page = pages.shape[1]
        pages[slots_T // page, slots_T % page] = k_TH.to(pages.dtype)
        k = pages.index_select(0, table_BP.flatten()).unflatten(0, table_BP.shape).flatten(1, 2)
        queries, q, w = (x.unflatten(0, (-1, mask.seq_len)) for x in (positions_T, q_TNH, w_TN))
        of_pages = replace(mask, seq_len=k.shape[1], queries=queries)
        sees = allowed(of_pages, None, k.device)[:, 0]
        return index_scores(q, k, w).masked_fill(~sees, float("-inf")).flatten(0, 1)

    more = (("tokens", None, None), ("tokens",), ("tokens", None), ("tokens",))
    region = index.region(on_rank, more, inputs, layout, c)
    scores_TS = region(cache.index_PSH, cache.slots_T, cache.table_BP, inputs.positions_T)
    return layout.constrain(scores_TS, *PAIRS)  # all-reduce over tp


def chosen(scores_TS: Tensor, axes: Axes, layout: Layout, c: IndexerConfig) -> Tensor:
    """Return whether a query attends to a key: a tensor like the scores. Rank-local."""

    def on_rank(scores_TS: Tensor) -> Tensor:
        return select_keys(scores_TS.detach(), c.top_k)

    return layout.local_map(on_rank, [axes], axes)(scores_TS)


def with_selected(mask: RowMask, selected_TS: Tensor, layout: Layout) -> RowMask:
    """Return the mask in which these pairs see each other. Rank-local, but for ``ulysses``.

    ``selected_TS``: this rank's queries and all keys, in the order of the row."""
    if isinstance(mask, AttentionMask):
        selected = selected_TS.unflatten(0, (-1, mask.seq_len))
        return replace(mask, selected=selected, blocks=None)
    if mask.sharding.method == "ulysses":
        rows = whole_rows(selected_TS.to(torch.uint8), mask, layout)  # all-gather over cp
        selected = in_row_order(rows, mask).bool()
    else:
        selected = selected_TS.unflatten(0, (-1, len(mask.order_S) // layout.parts("sequence")))
        selected = selected[..., mask.order_S]
    return replace(mask, steps=(replace(mask.steps[0], selected=selected, blocks=None),))


def head_weights(
    heads: Heads,
    documents_T: Tensor | None,
    selected_TS: Tensor | None,
    mask: RowMask,
    layout: Layout,
) -> Tensor:
    """Return the weights of attention, summed over this rank's heads: ``[T, S]``, keys in the order
    of the row. They have no gradient. Rank-local but for the keys, all-gathered over cp."""
    q, k_TKH = heads.q_TNH.detach(), heads.k_TKH.detach()
    k = in_row_order(whole_rows(k_TKH.flatten(1), mask, layout), mask)
    k, q = k.unflatten(-1, k_TKH.shape[1:]).transpose(1, 2), q.unflatten(0, (len(k), -1))
    if selected_TS is None:
        sees = visible(documents_T, mask, layout, q.device)
    else:
        sees = selected_TS.unflatten(0, (len(k), -1))
    whole = mask if isinstance(mask, AttentionMask) else mask.mask
    scale = q.shape[-1] ** -0.5 if whole.scale is None else whole.scale
    return attention_weights(q.transpose(1, 2), k, sees, scale, whole.softcap).flatten(0, 1)


def indexer_loss(
    scores_TS: Tensor,
    weights_TS: Tensor,
    chosen_TS: Tensor | None,
    valid_T: Tensor | None,
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    """Return the loss, and ``[2]``: the loss again and the number of tokens that count. They are
    sums over tokens, and pending. All inputs are of a rank's tokens under sequence parallelism.

    ``chosen_TS``: the keys over which the loss is (None: all that a query sees)."""

    def on_rank(
        scores_TS: Tensor, weights_TS: Tensor, chosen_TS: Tensor | None, valid_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        sees_TS = scores_TS > float("-inf") if chosen_TS is None else chosen_TS
        loss = (divergence(scores_TS, weights_TS, sees_TS) * valid_T).sum()
        return loss, torch.stack([loss.detach(), valid_T.sum().to(loss.dtype)])

    ins, total = (OWN_PAIRS, OWN_PAIRS, OWN_PAIRS, ("tokens_sp",)), ("+tokens_sp",)
    return layout.local_map(on_rank, ins, [total, total])(scores_TS, weights_TS, chosen_TS, valid_T)


def visible(
    documents_T: Tensor | None, mask: RowMask, layout: Layout, device: torch.device
) -> Tensor:
    """Return whether this rank's queries see the keys of their rows, ``[B or 1, S / n, S]``, with
    keys in the order of the row. Rank-local."""
    own = replace(own_queries(mask, layout), keys=None)
    documents = None if documents_T is None else documents_T.unflatten(0, (-1, own.seq_len))
    return allowed(own, documents, device)[:, 0]


def in_row_order(x: Tensor, mask: RowMask) -> Tensor:
    """Put ``[B, S, ...]`` from the order of ``order_S`` into the order of the row."""
    return x if isinstance(mask, AttentionMask) else x[:, mask.order_S.argsort()]
