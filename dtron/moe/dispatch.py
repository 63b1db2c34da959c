"""Dispatch: send tokens to their experts and combine the experts' outputs.

Each of T tokens goes to K experts. These T * K (token, expert) pairs are the *slots*. A
``TokenPermutation`` gives the row of each slot in a buffer that is sorted by expert. ``permute``
copies tokens into this buffer. ``unpermute`` multiplies the K outputs of each token by their
weights and sums them. Each is the backward of the other, so no scatter-add at random rows is ever
needed.

There are four dispatchers with one signature:
``(x_TD, weights_TK, index_TK, first, run, over) -> (y_TD, dropped)``.
``first``: the index of the first expert on this rank.
``run``: computes the experts of this rank, on rows sorted by expert.
``over``: the ranks that the experts are sharded over.
The dispatchers differ in their communication over ep and in their shapes:

    local        ep = 1: no communication; T * K rows.
    alltoall     Sends rows to the ranks of their experts, and back. The number of rows depends on
                 the data, so the host waits for it. Two all-to-alls of rows and one of E counts.
                 Not compiled.
    static       The same, with a fixed number of rows per expert and source rank, filled or not:
                 ``capacity_factor`` times the mean. Two all-to-alls. Slots beyond are dropped,
                 smallest weights first. With room for every token, no slot is dropped.
    allgather    Every rank all-gathers the tokens of its group, computes the rows of its own
                 experts, and a reduce-scatter sums the outputs. Sends less than an all-to-all
                 where ep < K. But the buffers have room for the slots of all ranks.

``static`` and ``allgather`` never wait for the host and compile without graph breaks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dtron.distributed.collectives import all_gather, all_to_all, reduce_scatter
from dtron.torch_compile import opaque

Dispatch = Literal["auto", "alltoall", "static", "allgather"]
Run = Callable[[Tensor, Tensor | None], Tensor]  # experts.compute on this rank's experts

Sent = tuple[Tensor, Tensor | None]  # y_TD and the number of dropped slots (None: cannot drop)


@dataclass(frozen=True)
class ExpertGroup:
    """Number of experts, their ranks, and their capacity.

    ``experts``: the number of experts on all ranks.
    ``ranks``: the ranks that the experts are sharded over (None: all experts are on this rank).
    ``capacity_factor``: rows per expert, as a multiple of the mean load (0: room for all tokens)."""

    experts: int
    ranks: DeviceMesh | None
    capacity_factor: float = 0.0

    @property
    def parts(self) -> int:
        return 1 if self.ranks is None else self.ranks.size()

    @property
    def here(self) -> int:
        return self.experts // self.parts


class TokenPermutation(NamedTuple):
    """Mapping between slots and rows of a buffer, in both directions.

    ``place_S``: the row of each slot.
    ``kept_S``: whether the slot has a row (None: every slot has one).
    ``slot_R``: the slot of each row.
    ``filled_R``: whether the row has a slot (None: every row has one)."""

    place_S: Tensor
    kept_S: Tensor | None
    slot_R: Tensor
    filled_R: Tensor | None


def by_expert(
    expert_S: Tensor, experts: int, kept_S: Tensor | None = None
) -> tuple[TokenPermutation, Tensor]:
    """Return a permutation with one row per slot, sorted by expert, and the row where each
    expert ends. Slots that are not kept have an expert index beyond the last expert. So they
    are sorted to the end, and their rows count as empty."""
    sorted_R, slot_R = expert_S.sort(stable=True)
    place_S = torch.empty_like(slot_R).scatter(
        0, slot_R, torch.arange(slot_R.shape[0], device=slot_R.device)
    )
    ends_E = torch.searchsorted(sorted_R, torch.arange(experts, device=slot_R.device), right=True)
    return TokenPermutation(
        place_S, kept_S, slot_R, None if kept_S is None else kept_S[slot_R]
    ), ends_E


def permute(x_TD: Tensor, plan: TokenPermutation) -> Tensor:
    """Copy into each row the token of its slot: ``[R, D]``."""
    return _Spread.apply(x_TD, *plan)


def unpermute(y_RD: Tensor, weights_TK: Tensor, plan: TokenPermutation) -> Tensor:
    """Sum the rows of each token, times their weights: ``[T, D]``."""
    return _Collect.apply(y_RD, weights_TK, *plan)


def _rows(x: Tensor, index: Tensor, there: Tensor | None) -> Tensor:
    """Select rows of x; a row that is not ``there`` is zero. Uses where() instead of multiplying
    by 0, because an unused row may hold any value (NaN too)."""
    rows = x.index_select(0, index)
    return rows if there is None else torch.where(there[:, None], rows, 0)


@opaque
class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, place_S, kept_S, slot_R, filled_R):
        ctx.save_for_backward(place_S, kept_S)
        ctx.tokens = x.shape[0]
        return _rows(x, slot_R // (place_S.shape[0] // x.shape[0]), filled_R)

    @staticmethod
    def backward(ctx, g):
        slots = _rows(g, *ctx.saved_tensors)
        return slots.view(ctx.tokens, -1, g.shape[1]).sum(1), None, None, None, None


@opaque
class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weights_TK, place_S, kept_S, slot_R, filled_R):
        ctx.save_for_backward(y, weights_TK, place_S, kept_S, slot_R, filled_R)
        rows_TKD = _rows(y, place_S, kept_S).view(*weights_TK.shape, y.shape[1])
        y_TD = (rows_TKD * weights_TK[:, :, None]).sum(1)
        return y_TD.to(y.dtype)

    @staticmethod
    def backward(ctx, g):
        y, weights_TK, place_S, kept_S, slot_R, filled_R = ctx.saved_tensors
        rows_TKD = _rows(y, place_S, kept_S).view(*weights_TK.shape, y.shape[1])
        d_weights = (rows_TKD * g[:, None]).sum(-1, dtype=weights_TK.dtype)
        k = weights_TK.shape[1]
        d_rows = (
            g.index_select(0, slot_R // k) * weights_TK.view(-1).index_select(0, slot_R)[:, None]
        )
        if filled_R is not None:
            d_rows = torch.where(filled_R[:, None], d_rows, 0)
        return d_rows.to(y.dtype), d_weights, None, None, None, None


def local(
    x_TD: Tensor, weights_TK: Tensor, index_TK: Tensor, first: Tensor, run: Run, over: ExpertGroup
) -> Sent:
    plan, ends_E = by_expert(index_TK.flatten(), over.experts)
    return unpermute(run(permute(x_TD, plan), ends_E), weights_TK, plan), None


def alltoall(
    x_TD: Tensor, weights_TK: Tensor, index_TK: Tensor, first: Tensor, run: Run, over: ExpertGroup
) -> Sent:
    plan, ends_E = by_expert(index_TK.flatten(), over.experts)
    counts_RE = ends_E.diff(prepend=ends_E.new_zeros(1)).view(over.parts, over.here)
    theirs_RE = all_to_all(counts_RE, over.ranks)  # rows from each rank per local expert
    sent, received = counts_RE.sum(1).tolist(), theirs_RE.sum(1).tolist()  # the host waits
    rows = all_to_all(permute(x_TD, plan), over.ranks, received, sent)
    experts = torch.arange(over.here, device=rows.device).repeat(over.parts)
    mine, ends_E = by_expert(experts.repeat_interleave(theirs_RE.flatten()), over.here)
    y = run(_permuted(rows, mine.slot_R, mine.place_S), ends_E)
    y = all_to_all(_permuted(y, mine.place_S, mine.slot_R), over.ranks, sent, received)
    return unpermute(y, weights_TK, plan), None


def _permuted(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return _Permute.apply(x, index, inverse)


@opaque
class _Permute(torch.autograd.Function):
    """``permute`` with one slot per token. The number of tokens may be 0."""

    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, g):
        return g.index_select(0, ctx.saved_tensors[0]), None, None


def static(
    x_TD: Tensor, weights_TK: Tensor, index_TK: Tensor, first: Tensor, run: Run, over: ExpertGroup
) -> Sent:
    tokens, k = index_TK.shape
    room = tokens  # a token goes to an expert at most once
    if over.capacity_factor:
        room = min(tokens, math.ceil(over.capacity_factor * tokens * k / over.experts))
    plan = by_room(index_TK.flatten(), weights_TK.detach().flatten(), over.experts, room)
    rows = permute(x_TD, plan)  # [E * room, D]
    if over.ranks is not None:
        rows = all_to_all(rows, over.ranks)
    rows = rows.view(over.parts, over.here, room, -1).transpose(0, 1).flatten(1, 2)
    y = run(rows, None)
    y = y.unflatten(1, (over.parts, room)).transpose(0, 1).flatten(0, 2)
    if over.ranks is not None:
        y = all_to_all(y.contiguous(), over.ranks)
    return unpermute(y, weights_TK, plan), (~plan.kept_S).sum()


def by_room(expert_S: Tensor, weight_S: Tensor, experts: int, room: int) -> TokenPermutation:
    """Give each expert ``room`` rows, for its slots with the largest weights."""
    device = expert_S.device
    by_weight = weight_S.argsort(descending=True, stable=True)
    order_S = by_weight[
        expert_S[by_weight].argsort(stable=True)
    ]  # sorted by expert, then by weight
    sorted_S = expert_S[order_S]
    starts_E = torch.searchsorted(sorted_S, torch.arange(experts, device=device))
    number_S = torch.arange(len(order_S), device=device) - starts_E[sorted_S]
    kept, rows = number_S < room, experts * room
    # Dropped slots share one extra row at the end, which is then sliced off.
    place = torch.where(kept, sorted_S * room + number_S, rows)
    slot_R = torch.zeros(rows + 1, dtype=order_S.dtype, device=device).scatter(0, place, order_S)[
        :rows
    ]
    filled_R = torch.zeros(rows + 1, dtype=torch.bool, device=device).scatter(0, place, kept)[:rows]
    place_S = torch.empty_like(place).scatter(0, order_S, place.clamp(max=rows - 1))
    return TokenPermutation(
        place_S, torch.empty_like(kept).scatter(0, order_S, kept), slot_R, filled_R
    )


def allgather(
    x_TD: Tensor, weights_TK: Tensor, index_TK: Tensor, first: Tensor, run: Run, over: ExpertGroup
) -> Sent:
    x_TD, weights_TK, index_TK = (all_gather(t, over.ranks) for t in (x_TD, weights_TK, index_TK))
    own_S = index_TK.flatten() - first
    kept_S = (own_S >= 0) & (own_S < over.here)
    plan, ends_E = by_expert(torch.where(kept_S, own_S, over.here), over.here, kept_S)
    y_TD = unpermute(run(permute(x_TD, plan), ends_E), weights_TK, plan)
    return reduce_scatter(y_TD, over.ranks), None


DISPATCHERS = {"local": local, "alltoall": alltoall, "static": static, "allgather": allgather}


def choose_dispatcher(dispatch: Dispatch, over: ExpertGroup) -> Callable:
    """Return the dispatcher for a setting."""
    if over.capacity_factor or dispatch == "static":
        return static
    if over.ranks is None:
        return local
    if dispatch == "auto":
        return allgather if torch.compiler.is_compiling() else alltoall
    return DISPATCHERS[dispatch]
