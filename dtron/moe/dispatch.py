"""Dispatch: send tokens to their experts and combine the experts' outputs.

Each of T tokens goes to K experts. These T * K (token, expert) pairs are the *slots*. A
``TokenPermutation`` gives the row of each slot in a buffer that is sorted by expert. ``permute``
copies tokens into this buffer. ``unpermute`` multiplies the K outputs of each token by their
weights and sums them. Each is the backward of the other, so no scatter-add at random rows is ever
needed.

There are four dispatchers with one signature:
``(x_TD, weights_TK, index_TK, first, run, experts) -> (y_TD, dropped)``.

``first``: the index of the first expert on this rank.
``run``: computes the experts of this rank, on rows sorted by expert.
``experts``: the number of experts, and the ranks that they are sharded over.

The dispatchers differ in their communication over ep and in their shapes:

    local        ep = 1: no communication; T * K rows.
    alltoall     Sends rows to the ranks of their experts, and back. The number of rows depends on
                 the data, so the host waits for this number. Two all-to-alls of rows and one of E
                 counts. Not compiled.
    static       Like alltoall, with a fixed number of rows per expert and source rank, filled or
                 not: ``capacity_factor`` times the mean. Two all-to-alls. Slots beyond are dropped,
                 smallest weights first. With room for every token, no slot is dropped.
    allgather    Every rank all-gathers the tokens of its group and computes the rows of its own
                 experts. A reduce-scatter sums the outputs. Sends less than an all-to-all where
                 ep < K. But the buffers have room for the slots of all ranks.

``static`` and ``allgather`` never wait for the host and compile without graph breaks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dtron.distributed.collectives import all_gather, all_to_all, reduce_scatter
from dtron.torch_compile import opaque

Dispatch = Literal["auto", "alltoall", "static", "allgather"]
RunExperts = Callable[[Tensor, Tensor | None], Tensor]  # experts.compute on this rank's experts
Used = Tensor | None  # whether a slot or a row is used
Combined = tuple[Tensor, Tensor | None]  # y_TD, number of dropped slots (None: cannot drop)


@dataclass(frozen=True)
class ExpertGroup:
    """Number of experts, their ranks, and their capacity.

    ``total``: the number of experts on all ranks.
    ``ranks``: the ranks that the experts are sharded over (None: all experts are on this rank).
    ``capacity_factor``: rows per expert, as a multiple of the mean load (0: room for all tokens).
    """

    total: int
    ranks: DeviceMesh | None
    capacity_factor: float = 0.0

    @property
    def parts(self) -> int:
        """The number of ranks that the experts are sharded over."""
        return 1 if self.ranks is None else self.ranks.size()

    @property
    def per_rank(self) -> int:
        """The number of experts on each rank."""
        return self.total // self.parts


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
    """Return a permutation with one row per slot, sorted by expert, and the row where each expert
    ends. Slots that are not kept have an expert index beyond the last expert. So these slots are
    sorted to the end, and their rows count as empty."""
    sorted_R, slot_R = expert_S.sort(stable=True)
    rows_R = torch.arange(slot_R.shape[0], device=slot_R.device)
    place_S = torch.empty_like(slot_R).scatter(0, slot_R, rows_R)
    ends_E = torch.searchsorted(sorted_R, torch.arange(experts, device=slot_R.device), right=True)
    filled_R = None if kept_S is None else kept_S[slot_R]
    return TokenPermutation(place_S, kept_S, slot_R, filled_R), ends_E


def permute(x_TD: Tensor, permutation: TokenPermutation) -> Tensor:
    """Copy into each row the token of its slot: ``[R, D]``."""
    return _PermuteTokens.apply(x_TD, *permutation)


def unpermute(y_RD: Tensor, weights_TK: Tensor, permutation: TokenPermutation) -> Tensor:
    """Sum the rows of each token, times their weights: ``[T, D]``."""
    return _UnpermuteTokens.apply(y_RD, weights_TK, *permutation)


def _rows(x: Tensor, index: Tensor, used: Tensor | None) -> Tensor:
    """Select rows of x. Unused rows become zero by ``where``, not by a product with 0, because an
    unused row may hold any value (NaN too).

    ``used``: whether a selected row is used (None: all are)."""
    rows = x.index_select(0, index)
    return rows if used is None else torch.where(used[:, None], rows, 0)


@opaque
class _PermuteTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, place_S: Tensor, kept_S: Used, slot_R: Tensor, filled_R: Used
    ) -> Tensor:
        ctx.save_for_backward(place_S, kept_S)
        ctx.tokens = x.shape[0]
        return _rows(x, slot_R // (place_S.shape[0] // x.shape[0]), filled_R)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        slots = _rows(g, *ctx.saved_tensors)
        return slots.view(ctx.tokens, -1, g.shape[1]).sum(1), None, None, None, None


@opaque
class _UnpermuteTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weights_TK: Tensor,
        place_S: Tensor,
        kept_S: Used,
        slot_R: Tensor,
        filled_R: Used,
    ) -> Tensor:
        ctx.save_for_backward(y, weights_TK, place_S, kept_S, slot_R, filled_R)
        rows_TKD = _rows(y, place_S, kept_S).view(*weights_TK.shape, y.shape[1])
        y_TD = (rows_TKD * weights_TK[:, :, None]).sum(1)
        return y_TD.to(y.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, weights_TK, place_S, kept_S, slot_R, filled_R = ctx.saved_tensors
        rows_TKD = _rows(y, place_S, kept_S).view(*weights_TK.shape, y.shape[1])
        d_weights = (rows_TKD * g[:, None]).sum(-1, dtype=weights_TK.dtype)
        k = weights_TK.shape[1]
        weights_R = weights_TK.view(-1).index_select(0, slot_R)
        d_rows = g.index_select(0, slot_R // k) * weights_R[:, None]
        if filled_R is not None:
            d_rows = torch.where(filled_R[:, None], d_rows, 0)
        return d_rows.to(y.dtype), d_weights, None, None, None, None


def local(
    x_TD: Tensor,
    weights_TK: Tensor,
    index_TK: Tensor,
    first: Tensor,
    run: RunExperts,
    experts: ExpertGroup,
) -> Combined:
    """Compute without communication."""
    permutation, ends_E = by_expert(index_TK.flatten(), experts.total)
    return unpermute(run(permute(x_TD, permutation), ends_E), weights_TK, permutation), None


def alltoall(
    x_TD: Tensor,
    weights_TK: Tensor,
    index_TK: Tensor,
    first: Tensor,
    run: RunExperts,
    experts: ExpertGroup,
) -> Combined:
    """Send a number of rows that depends on the data, over ep."""
    assert experts.ranks is not None  # choose_dispatcher: one rank needs no sends
    permutation, ends_E = by_expert(index_TK.flatten(), experts.total)
    counts_RE = ends_E.diff(prepend=ends_E.new_zeros(1)).view(experts.parts, experts.per_rank)
    received_RE = all_to_all(counts_RE, experts.ranks)  # rows from each rank per local expert
    sent, received = counts_RE.sum(1).tolist(), received_RE.sum(1).tolist()  # the host waits
    rows = all_to_all(permute(x_TD, permutation), experts.ranks, received, sent)
    own = torch.arange(experts.per_rank, device=rows.device).repeat(experts.parts)
    mine, ends_E = by_expert(own.repeat_interleave(received_RE.flatten()), experts.per_rank)
    y = run(_permuted(rows, mine.slot_R, mine.place_S), ends_E)
    y = all_to_all(_permuted(y, mine.place_S, mine.slot_R), experts.ranks, sent, received)
    return unpermute(y, weights_TK, permutation), None


def _permuted(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return _PermuteRows.apply(x, index, inverse)


@opaque
class _PermuteRows(torch.autograd.Function):
    """Like ``permute``, with one slot per token. The number of tokens may be 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return g.index_select(0, ctx.saved_tensors[0]), None, None


def static(
    x_TD: Tensor,
    weights_TK: Tensor,
    index_TK: Tensor,
    first: Tensor,
    run: RunExperts,
    experts: ExpertGroup,
) -> Combined:
    """Send a fixed number of rows to each expert, over ep."""
    tokens, k = index_TK.shape
    room = tokens  # a token goes to an expert at most once
    if experts.capacity_factor:
        room = min(tokens, math.ceil(experts.capacity_factor * tokens * k / experts.total))
    permutation = by_room(index_TK.flatten(), weights_TK.detach().flatten(), experts.total, room)
    rows = permute(x_TD, permutation)  # [E * room, D]
    if experts.ranks is not None:
        rows = all_to_all(rows, experts.ranks)
    rows = rows.view(experts.parts, experts.per_rank, room, -1).transpose(0, 1).flatten(1, 2)
    y = run(rows, None)
    y = y.unflatten(1, (experts.parts, room)).transpose(0, 1).flatten(0, 2)
    if experts.ranks is not None:
        y = all_to_all(y.contiguous(), experts.ranks)
    assert permutation.kept_S is not None  # by_room gives it
    return unpermute(y, weights_TK, permutation), (~permutation.kept_S).sum()


def by_room(expert_S: Tensor, weight_S: Tensor, experts: int, room: int) -> TokenPermutation:
    """Give each expert ``room`` rows, for its slots with the largest weights."""
    device = expert_S.device
    by_weight = weight_S.argsort(descending=True, stable=True)
    order_S = by_weight[expert_S[by_weight].argsort(stable=True)]  # by expert, then by weight
    sorted_S = expert_S[order_S]
    starts_E = torch.searchsorted(sorted_S, torch.arange(experts, device=device))
    number_S = torch.arange(len(order_S), device=device) - starts_E[sorted_S]
    kept, rows = number_S < room, experts * room
    # Dropped slots share one extra row at the end, which is then sliced off.
    place = torch.where(kept, sorted_S * room + number_S, rows)
    slot_R = torch.zeros(rows + 1, dtype=order_S.dtype, device=device).scatter(0, place, order_S)
    filled_R = torch.zeros(rows + 1, dtype=torch.bool, device=device).scatter(0, place, kept)
    place_S = torch.empty_like(place).scatter(0, order_S, place.clamp(max=rows - 1))
    kept_S = torch.empty_like(kept).scatter(0, order_S, kept)
    return TokenPermutation(place_S, kept_S, slot_R[:rows], filled_R[:rows])


def allgather(
    x_TD: Tensor,
    weights_TK: Tensor,
    index_TK: Tensor,
    first: Tensor,
    run: RunExperts,
    experts: ExpertGroup,
) -> Combined:
    """All-gather the tokens over ep."""
    assert experts.ranks is not None  # choose_dispatcher: one rank needs no sends
    x_TD, weights_TK, index_TK = (
        all_gather(t, experts.ranks) for t in (x_TD, weights_TK, index_TK)
    )
    own_S = index_TK.flatten() - first
    kept_S = (own_S >= 0) & (own_S < experts.per_rank)
    permutation, ends_E = by_expert(
        torch.where(kept_S, own_S, experts.per_rank), experts.per_rank, kept_S
    )
    y_TD = unpermute(run(permute(x_TD, permutation), ends_E), weights_TK, permutation)
    return reduce_scatter(y_TD, experts.ranks), None


DISPATCHERS = {"local": local, "alltoall": alltoall, "static": static, "allgather": allgather}


def choose_dispatcher(dispatch: Dispatch, experts: ExpertGroup) -> Callable:
    """Return the dispatcher for a setting."""
    if experts.capacity_factor or dispatch == "static":
        return static
    if experts.ranks is None:
        return local
    if dispatch == "auto":
        return allgather if torch.compiler.is_compiling() else alltoall
    return DISPATCHERS[dispatch]
