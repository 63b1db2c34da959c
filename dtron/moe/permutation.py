"""The order of tokens at their experts, and the way there and back.

Each of T tokens goes to K experts: T * K *slots*. A ``TokenPermutation`` gives the row of each slot
in a buffer that is sorted by expert. ``permute`` copies tokens into this buffer. ``unpermute``
multiplies the K outputs of each token by their weights and sums them. Each is the backward of the
other, so no scatter-add at random rows is ever needed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

Used = Tensor | None  # whether a slot or a row is used


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


def by_room(
    expert_S: Tensor, weight_S: Tensor, experts: int, room: int, limit: Tensor | None = None
) -> TokenPermutation:
    """Give each expert ``room`` rows, for its slots with the largest weights. Slots whose expert is
    ``experts`` get no row.

    ``limit``: the number of rows of each expert that may be filled (None: all)."""
    device = expert_S.device
    by_weight = weight_S.argsort(descending=True, stable=True)
    order_S = by_weight[expert_S[by_weight].argsort(stable=True)]  # by expert, then by weight
    sorted_S = expert_S[order_S]
    starts_E = torch.searchsorted(sorted_S, torch.arange(experts + 1, device=device))
    number_S = torch.arange(len(order_S), device=device) - starts_E[sorted_S]
    kept, rows = (
        (number_S < (room if limit is None else limit)) & (sorted_S < experts),
        experts * room,
    )
    # Dropped slots share one extra row at the end, which is then sliced off.
    place = torch.where(kept, sorted_S * room + number_S, rows)
    slot_R = torch.zeros(rows + 1, dtype=order_S.dtype, device=device).scatter(0, place, order_S)
    filled_R = torch.zeros(rows + 1, dtype=torch.bool, device=device).scatter(0, place, kept)
    place_S = torch.empty_like(place).scatter(0, order_S, place.clamp(max=rows - 1))
    kept_S = torch.empty_like(kept).scatter(0, order_S, kept)
    return TokenPermutation(place_S, kept_S, slot_R[:rows], filled_R[:rows])


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


def _summed(
    x: Tensor, permutation: tuple[Tensor, Used], weights_TK: Tensor | None, k: int
) -> Tensor:
    """Sum the K rows of each token, times their weights if there are any. One term after the
    other: a compiler reads each row once and keeps no ``[T, K, D]``."""
    places, used = (None if t is None else t.view(-1, k) for t in permutation)
    assert places is not None
    wide = torch.promote_types(x.dtype, torch.float32)
    total: Tensor | None = None
    for i in range(k):
        term = _rows(x, places[:, i], None if used is None else used[:, i]).to(wide)
        term = term if weights_TK is None else term * weights_TK[:, i, None]
        total = term if total is None else total + term
    assert total is not None
    return total.to(x.dtype)


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
        place_S, kept_S = ctx.saved_tensors
        dx = _summed(g, (place_S, kept_S), None, place_S.shape[0] // ctx.tokens)
        return dx, None, None, None, None


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
        return _summed(y, (place_S, kept_S), weights_TK, weights_TK.shape[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, weights_TK, place_S, kept_S, slot_R, filled_R = ctx.saved_tensors
        # In the order of the rows: y is read once for both gradients, in order.
        k = weights_TK.shape[1]
        g_RD = g.index_select(0, slot_R // k)
        d_weights_R = (y * g_RD).sum(-1, dtype=weights_TK.dtype)
        d_rows = g_RD * weights_TK.view(-1).index_select(0, slot_R)[:, None]
        if filled_R is not None:
            d_rows = torch.where(filled_R[:, None], d_rows, 0)
        d_weights_S = d_weights_R.index_select(0, place_S)
        if kept_S is not None:
            d_weights_S = torch.where(kept_S, d_weights_S, 0)
        d_weights = d_weights_S.view(weights_TK.shape)
        return d_rows.to(y.dtype), d_weights, None, None, None, None


def permuted(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Select rows of x. ``index`` has every row once, and ``inverse`` is its inverse."""
    return _PermuteRows.apply(x, index, inverse)


class _PermuteRows(torch.autograd.Function):
    """Like ``permute``, with one slot per token. The number of tokens may be 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return g.index_select(0, ctx.saved_tensors[0]), None, None
