"""Context parallelism: attention where every rank holds a shard of each sequence.

All layers of a transformer except attention work token by token. They never see that their tokens
belong to a longer row. Attention needs the keys and values of all earlier tokens, whichever rank
holds the tokens. Three methods fetch keys and values, with one signature:

    allgather   Every rank all-gathers the keys and values of whole rows and attends with its own
                queries. This is the easiest method to verify. Memory: keys and values of whole
                rows.
    ring        Keys and values arrive shard by shard. Receiving a shard is hidden behind the
                attention to the previous shard (see ring_attention.py). Memory: two shards. Works
                for any number of heads. This is the default: under grouped-query attention keys and
                values are small, and their communication is hidden.
    ulysses     One all-to-all turns shards of rows with all heads into whole rows with 1/n of the
                heads. A second all-to-all returns the result (Jacobs et al. 2023,
                arXiv:2309.14509). Between the two, attention is the ordinary attention. Queries and
                results are sent too, but each rank sends only an n-th of everything. So ulysses
                sends less on many ranks. Nothing hides this communication. The number of ranks must
                divide the number of kv heads.

docs/context-parallelism.md lists the bytes that each method sends, and a test counts them.

To mask, a rank must know the *places* of its own tokens and of the other ranks' tokens. A place is
an index in the row. Positions cannot replace places, because with packed documents positions
restart. Every rank holds the documents of whole rows, ``[T@rows]``, and looks them up by place.
Places and masks are the same in every layer, so ``prepare`` makes them once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dtron.distributed.collectives import AxisGroup, all_gather, all_to_all
from dtron.layers.attention_block_kernels import kernel_for
from dtron.layers.attention_kernels import CORES, LEAST_HEAD_DIM, AttentionPath, choose, with_blocks
from dtron.layers.attention_logits import largest_logits
from dtron.layers.attention_mask import AttentionMask
from dtron.layers.ring_attention import AXIS, ring, ring_plainly
from dtron.layers.token_order import row_order
from dtron.mesh import Layout
from dtron.torch_compile import kernel_device

Method = Literal["ring", "allgather", "ulysses"]


@dataclass(frozen=True)
class RowSharding:
    """The sharding of rows over cp.

    ``method``: the method by which attention gets its keys.
    ``zigzag``: whether rows are in zig-zag order, see token_order.py."""

    method: Method = "ring"
    zigzag: bool = False


@dataclass(frozen=True)
class ContextParallelMask:
    """The ``AttentionMask`` of the row, plus the data that this rank needs for its row shard.

    ``mask``: the mask of whole rows.
    ``sharding``: how cp shards the rows.
    ``place [1]``: the index of this rank's shard.
    ``order_S``: the places of all shards, concatenated.
    ``steps``: the masks between this rank's queries and the keys of each shard, in the order in
    which a ring delivers the shards."""

    mask: AttentionMask
    sharding: RowSharding
    place: Tensor
    order_S: Tensor
    steps: tuple[AttentionMask, ...]

    @property
    def later(self) -> Tensor:
        """Return ``[n]``: for each step, whether its shard is later in the row than this rank's
        shard."""
        own, keys = self.steps[0].queries, [m.keys for m in self.steps]
        assert own is not None
        return torch.stack([k[0] for k in keys if k is not None]) > own[0, 0]


def prepare(
    mask: AttentionMask,
    documents_T: Tensor | None,
    sinks: bool,
    head_dims: tuple[int, int],
    x_TD: Tensor,
    layout: Layout,
    path: AttentionPath = "auto",
    sharding: RowSharding = RowSharding(),
) -> tuple[AttentionMask | ContextParallelMask, AttentionPath]:
    """Make once the data that all layers of a stage share: the path that ``auto`` stands for, the
    places of this rank's tokens in their rows, and for flex the block masks. Communicates nothing.

    ``documents_T [T@rows]``: whole rows on every rank.
    ``sinks``: whether the layers have sinks.
    ``head_dims``: the width of a head of queries and keys, and the width of a head of values.
    ``x_TD``: an activation. Only its dtype and device matter."""
    method, zigzag = sharding.method, sharding.zigzag
    parts, device, least = layout.parts(AXIS), x_TD.device, min(head_dims)
    if parts == 1 or method == "ulysses":
        steps = (mask,)
    else:
        order_PC = row_order(mask.seq_len, parts, zigzag, device).view(parts, -1)
        place = layout.to_local(layout.iota(AXIS, parts, device), AXIS)
        own = order_PC[place]  # [1, S / n], the same in every row
        keys = order_PC[(place - torch.arange(parts, device=device)) % parts]
        keys = (order_PC.flatten(),) if method == "allgather" else keys.unbind()
        steps = tuple(replace(mask, queries=own, keys=places) for places in keys)
    asked = mask if parts > 1 and method == "ring" else steps[0]
    requested = path
    path = choose(requested, asked, documents_T is not None, sinks, least, x_TD.dtype, device)
    if requested == "auto" and path == "sdpa" and parts > 1 and method == "ring":
        # On a GPU, a ring without a fused kernel would hold all scores in memory: use flex.
        able = (
            kernel_device(device) == "cuda"
            and least >= LEAST_HEAD_DIM
            and x_TD.dtype != torch.float64
        )
        if able and kernel_for(device, x_TD.dtype, *head_dims) == "written":
            path = "flex"
    if path == "flex":
        documents = None
        if documents_T is not None:
            documents = layout.to_local(documents_T, "rows").unflatten(0, (-1, mask.seq_len))
        steps = tuple(with_blocks(m, documents, device) for m in steps)
    if parts == 1:
        return steps[0], path
    order_S = row_order(mask.seq_len, parts, zigzag, device)
    place = layout.to_local(layout.iota(AXIS, parts, device), AXIS)
    return ContextParallelMask(mask, sharding, place, order_S, steps), path


def attend(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    documents_T: Tensor | None,
    sinks_N: Tensor | None,
    mask: AttentionMask | ContextParallelMask,
    layout: Layout,
    path: AttentionPath,
) -> Tensor:
    """Compute attention for this rank's tokens, inside a local region: ``[T@tokens, heads, H]`` ->
    the same shape, with v's H.

    ``documents_T``: ``[T@rows]``.
    ``mask``, ``path``: the results of ``prepare``."""
    whole = mask if isinstance(mask, AttentionMask) else mask.mask
    documents = None if documents_T is None else documents_T.unflatten(0, (-1, whole.seq_len))
    if isinstance(mask, AttentionMask):
        least = min(q_TNH.shape[-1], v_TKH.shape[-1])
        path = choose(
            path, mask, documents is not None, sinks_N is not None, least, q_TNH.dtype, q_TNH.device
        )
        q, k, v = (_heads_first(t.unflatten(0, (-1, mask.seq_len))) for t in (q_TNH, k_TKH, v_TKH))
        return CORES[path](q, k, v, documents, sinks_N, mask).transpose(1, 2).flatten(0, 1)
    return METHODS[mask.sharding.method](
        q_TNH, k_TKH, v_TKH, documents, sinks_N, mask, layout, path
    )


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _row_shards(x_TNH: Tensor, context: ContextParallelMask) -> Tensor:
    """Return ``[B, heads, S / n, H]``: this rank's shard of each row."""
    return _heads_first(x_TNH.unflatten(0, (-1, len(context.order_S) // len(context.steps))))


def by_ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents_BS: Tensor | None,
    sinks_N: Tensor | None,
    context: ContextParallelMask,
    layout: Layout,
    path: AttentionPath,
) -> Tensor:
    """Compute attention by ``ring``; see the module. Plain causal masks take the fused ring."""
    q, k, v = (_row_shards(x, context) for x in (q, k, v))
    peers = _peers(layout)
    plain = documents_BS is None and not context.mask.windowed
    if path == "sdpa" and plain:
        o = ring(q, k, v, context.later, context.sharding.zigzag, peers, context.mask.scale)
    else:
        o = ring_plainly(q, k, v, documents_BS, sinks_N, context.steps, peers, path == "flex")
    return o.transpose(1, 2).flatten(0, 1)


def by_allgather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents_BS: Tensor | None,
    sinks_N: Tensor | None,
    context: ContextParallelMask,
    layout: Layout,
    path: AttentionPath,
) -> Tensor:
    """Compute attention by ``allgather``; see the module."""
    widths = (k.shape[1] * k.shape[2], v.shape[1] * v.shape[2])
    rows = whole_rows(torch.cat([k.flatten(1), v.flatten(1)], dim=-1), context, layout)
    k, v = (
        _heads_first(x.unflatten(-1, like.shape[1:]))
        for x, like in zip(rows.split(widths, dim=-1), (k, v), strict=True)
    )
    q = _heads_first(q.unflatten(0, (len(k), -1)))
    o = CORES[path](q, k, v, documents_BS, sinks_N, context.steps[0])
    return o.transpose(1, 2).flatten(0, 1)


def whole_rows(x_TC: Tensor, mask: AttentionMask | ContextParallelMask, layout: Layout) -> Tensor:
    """Return ``[B, S, C]``, in the order of ``order_S``, from this rank's shard of each row."""
    if isinstance(mask, AttentionMask):
        return x_TC.unflatten(0, (-1, mask.seq_len))
    n = layout.parts(AXIS)
    x_TC = all_gather(x_TC, _peers(layout).ranks)  # over cp; backward: reduce-scatter
    return x_TC.unflatten(0, (n, -1, len(mask.order_S) // n)).transpose(0, 1).flatten(1, 2)


def own_queries(mask: AttentionMask | ContextParallelMask, layout: Layout) -> AttentionMask:
    """Return the mask between this rank's queries and all keys of their rows, in the order of
    ``order_S``."""
    if isinstance(mask, AttentionMask):
        return mask
    shards_PC = mask.order_S.unflatten(0, (layout.parts(AXIS), -1))
    return replace(mask.mask, queries=shards_PC[mask.place], keys=mask.order_S)


def largest_of_shard(
    q_TNH: Tensor,
    k_TKH: Tensor,
    documents_T: Tensor | None,
    mask: AttentionMask | ContextParallelMask,
    layout: Layout,
) -> Tensor:
    """Return ``largest_logits`` of this rank's queries with all keys of their rows, inside a local
    region. Over cp, keys of whole rows are all-gathered, whichever method attention has.

    ``documents_T``: ``[T@rows]``.
    ``mask``: a result of ``prepare``."""
    whole = own_queries(mask, layout)
    k = whole_rows(k_TKH.detach().flatten(1), mask, layout).unflatten(-1, k_TKH.shape[1:])
    q = q_TNH.unflatten(0, (len(k), -1))
    documents = None if documents_T is None else documents_T.unflatten(0, (-1, whole.seq_len))
    return largest_logits(_heads_first(q), _heads_first(k), documents, whole)


def by_ulysses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents_BS: Tensor | None,
    sinks_N: Tensor | None,
    context: ContextParallelMask,
    layout: Layout,
    path: AttentionPath,
) -> Tensor:
    """Compute attention by ``ulysses``; see the module."""
    n, given = layout.parts(AXIS), (q, k, v)
    # [n, T, heads / n * H] each
    shards = [x.unflatten(1, (n, -1)).movedim(1, 0).flatten(2) for x in given]
    sent_TC = torch.cat(shards, dim=-1).flatten(0, 1)
    received = all_to_all(sent_TC, _peers(layout).ranks)  # over cp
    rows = received.unflatten(0, (n, -1, len(context.order_S) // n)).transpose(0, 1).flatten(1, 2)
    zigzag = context.sharding.zigzag
    rows = rows[:, context.order_S.argsort()] if zigzag else rows
    parts = rows.split([x.shape[-1] for x in shards], dim=-1)
    q, k, v = (
        _heads_first(x.unflatten(-1, (-1, like.shape[-1])))
        for x, like in zip(parts, given, strict=True)
    )
    sinks_N = None if sinks_N is None else sinks_N.unflatten(0, (n, -1))[context.place].flatten()
    o = CORES[path](q, k, v, documents_BS, sinks_N, context.steps[0]).transpose(1, 2).flatten(2)
    o = o[:, context.order_S] if zigzag else o
    o = o.unflatten(1, (n, -1)).transpose(0, 1).flatten(0, 2)
    o = all_to_all(o, _peers(layout).ranks).unflatten(0, (n, -1))  # over cp
    return o.unflatten(-1, (-1, given[2].shape[-1])).movedim(0, 1).flatten(1, 2)


def _peers(layout: Layout) -> AxisGroup:
    peers = layout.group("cp")
    assert peers is not None  # one rank has whole rows, and needs no method
    return peers


METHODS = {"ring": by_ring, "allgather": by_allgather, "ulysses": by_ulysses}
