"""The layers of lab 8 that a student's test judges: means of the tokens of each expert, right and
with one fault each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Means = Callable[[Tensor, Tensor, int], Tensor]
BLOCK = 4  # rows that a kernel writes at once


def memory(*shape: int, like: Tensor) -> Tensor:
    """Unwritten memory: NaN if memory is poisoned. Zeros otherwise, which is what new memory often
    has, so that a grade does not depend on chance."""
    x = torch.empty(shape, dtype=like.dtype)
    return x if torch.are_deterministic_algorithms_enabled() else x.zero_()


def buffer(x_TD: Tensor, expert_T: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Write tokens into the rows of their experts: ``[E, T, D]``, and the number of rows that are
    written of each expert. All other rows stay unwritten."""
    rows_ETD = memory(experts, *x_TD.shape, like=x_TD)
    counts_E = torch.bincount(expert_T, minlength=experts)
    for e in range(experts):
        rows_ETD[e, : int(counts_E[e])] = x_TD[expert_T == e]
    return rows_ETD, counts_E


def written(rows_ETD: Tensor, counts_E: Tensor) -> Tensor:
    """Whether a row is written: ``[E, T, 1]``."""
    return (torch.arange(rows_ETD.shape[1]) < counts_E[:, None])[:, :, None]


def selected(x_TD: Tensor, expert_T: Tensor, experts: int) -> Tensor:
    """A right layer. Its buffer has unwritten rows, which no sum reads."""
    rows_ETD, counts_E = buffer(x_TD, expert_T, experts)
    kept = torch.where(written(rows_ETD, counts_E), rows_ETD, 0)
    return kept.sum(1) / counts_E.clamp(min=1)[:, None]


def added(x_TD: Tensor, expert_T: Tensor, experts: int) -> Tensor:
    """A right layer without a buffer."""
    sums_ED = x_TD.new_zeros(experts, x_TD.shape[1]).index_add(0, expert_T, x_TD)
    return sums_ED / torch.bincount(expert_T, minlength=experts).clamp(min=1)[:, None]


def _every_row(x_TD: Tensor, expert_T: Tensor, experts: int) -> Tensor:
    rows_ETD, counts_E = buffer(x_TD, expert_T, experts)
    return rows_ETD.sum(1) / counts_E.clamp(min=1)[:, None]


def _times_zero(x_TD: Tensor, expert_T: Tensor, experts: int) -> Tensor:
    rows_ETD, counts_E = buffer(x_TD, expert_T, experts)
    return (rows_ETD * written(rows_ETD, counts_E)).sum(1) / counts_E.clamp(min=1)[:, None]


def _no_row_for_no_token(x_TD: Tensor, expert_T: Tensor, experts: int) -> Tensor:
    y_ED, means_ED = memory(experts, x_TD.shape[1], like=x_TD), added(x_TD, expert_T, experts)
    for e in expert_T.unique().tolist():
        y_ED[e] = means_ED[e]
    return y_ED


def _all_tokens(x_TD: Tensor, expert_T: Tensor, experts: int) -> Tensor:
    """Divides by the largest number of tokens of an expert."""
    sums_ED = x_TD.new_zeros(experts, x_TD.shape[1]).index_add(0, expert_T, x_TD)
    return sums_ED / torch.bincount(expert_T, minlength=experts).max()


class _Backward(torch.autograd.Function):
    """``added``, with a gradient of its own: ``gradient(g_ED, expert_T, counts_E)``."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, expert_T: Tensor, experts: int, gradient: Callable
    ) -> Tensor:
        ctx.gradient, ctx.expert_T = gradient, expert_T
        ctx.counts_E = torch.bincount(expert_T, minlength=experts)
        return added(x_TD, expert_T, experts)

    @staticmethod
    def backward(ctx: Any, g_ED: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gradient(g_ED, ctx.expert_T, ctx.counts_E), None, None, None


def with_gradient(gradient: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Means:
    """Make a mutant whose output is right."""

    def mutant(x_TD: Tensor, expert_T: Tensor, experts: int) -> Tensor:
        return _Backward.apply(x_TD, expert_T, experts, gradient)

    return mutant


def _unwritten_end(g_ED: Tensor, expert_T: Tensor, counts_E: Tensor) -> Tensor:
    """Adds the gradient to memory that is zero up to the last whole block of rows, and unwritten
    beyond."""
    g_TD = memory(len(expert_T), g_ED.shape[1], like=g_ED)
    whole = len(expert_T) // BLOCK * BLOCK
    g_TD[:whole] = 0
    return g_TD + (g_ED / counts_E.clamp(min=1)[:, None])[expert_T]


def _undivided(g_ED: Tensor, expert_T: Tensor, counts_E: Tensor) -> Tensor:
    return g_ED[expert_T]


RIGHT: tuple[Means, ...] = (selected, added)
MUTANTS: tuple[Means, ...] = (
    _every_row,
    _times_zero,
    _no_row_for_no_token,
    _all_tokens,
    with_gradient(_unwritten_end),
    with_gradient(_undivided),
)
