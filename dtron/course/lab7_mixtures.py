"""The layers of experts that a student's test of lab 7 judges, on one device: right ones, and
mutants with one fault each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# (x_TD, scores_TE, w_EDF, k, factor) -> the output [T, F], and the balance loss
Mixture = Callable[[Tensor, Tensor, Tensor, int, float | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Slots:
    """Slots in the order of tokens: their experts and weights, and whether an expert keeps them."""

    expert_S: Tensor
    weight_S: Tensor
    kept_S: Tensor


def room(tokens: int, k: int, experts: int, factor: float | None) -> int:
    """Return the rows of an expert; without a factor no slot is dropped."""
    return tokens if factor is None else min(tokens, math.ceil(factor * tokens * k / experts))


def largest(expert_S: Tensor, weight_S: Tensor, rows: int) -> Tensor:
    """Keep a slot if fewer than ``rows`` slots of its expert have a larger weight."""
    larger = (expert_S[:, None] == expert_S) & (weight_S > weight_S[:, None])
    return larger.sum(1) < rows


def slots(
    scores_TE: Tensor,
    k: int,
    factor: float | None,
    rows: Callable[[int, int, int, float | None], int] = room,
    keep: Callable[[Tensor, Tensor, int], Tensor] = largest,
) -> Slots:
    weight_TK, index_TK = scores_TE.topk(k)
    expert_S, weight_S = index_TK.flatten(), weight_TK.flatten()
    tokens, experts = scores_TE.shape
    return Slots(expert_S, weight_S, keep(expert_S, weight_S, rows(tokens, k, experts, factor)))


def output(x_TD: Tensor, w_EDF: Tensor, s: Slots, k: int) -> Tensor:
    """Multiply each expert's rows at once, and sum the slots of each token."""
    rows_SD = x_TD.repeat_interleave(k, 0)
    y_SF = torch.zeros(len(rows_SD), w_EDF.shape[2], dtype=x_TD.dtype)
    for e, w in enumerate(w_EDF):
        own = (s.expert_S == e) & s.kept_S
        y_SF = y_SF.index_add(0, own.nonzero().flatten(), (rows_SD[own] @ w).tanh())
    return (y_SF * s.weight_S[:, None]).unflatten(0, (-1, k)).sum(1)


def balance(scores_TE: Tensor, expert_S: Tensor) -> Tensor:
    experts = scores_TE.shape[1]
    f_E = torch.bincount(expert_S, minlength=experts) / len(expert_S)
    return experts * (scores_TE * f_E).sum()


def loop(
    x_TD: Tensor, scores_TE: Tensor, w_EDF: Tensor, k: int, factor: float | None
) -> tuple[Tensor, Tensor]:
    """A right layer: a loop over experts."""
    s = slots(scores_TE, k, factor)
    return output(x_TD, w_EDF, s, k), balance(scores_TE, s.expert_S)


def dense(
    x_TD: Tensor, scores_TE: Tensor, w_EDF: Tensor, k: int, factor: float | None
) -> tuple[Tensor, Tensor]:
    """A right layer: every token at every expert."""
    s = slots(scores_TE, k, factor)
    gate_TE = torch.zeros_like(scores_TE)
    token_S = torch.arange(len(x_TD)).repeat_interleave(k)
    gate_TE = gate_TE.index_put((token_S, s.expert_S), s.weight_S * s.kept_S)
    y_TF = torch.einsum("te,tef->tf", gate_TE, torch.einsum("td,edf->tef", x_TD, w_EDF).tanh())
    return y_TF, balance(scores_TE, s.expert_S)


# ---- mutants


def changed(
    choose: Callable[[Tensor, int, float | None], Slots] = slots,
    out: Callable[[Tensor, Tensor, Slots, int], Tensor] = output,
    loss: Callable[[Tensor, Slots], Tensor] | None = None,
) -> Mixture:
    """Make a mutant of ``loop`` with other slots, another output or another balance loss."""

    def mutant(
        x_TD: Tensor, scores_TE: Tensor, w_EDF: Tensor, k: int, factor: float | None
    ) -> tuple[Tensor, Tensor]:
        s = choose(scores_TE, k, factor)
        right = balance(scores_TE, s.expert_S)
        return out(x_TD, w_EDF, s, k), loss(scores_TE, s) if loss else right

    return mutant


def _rounded_down(tokens: int, k: int, experts: int, factor: float | None) -> int:
    return tokens if factor is None else math.floor(factor * tokens * k / experts)


def _without_k(tokens: int, k: int, experts: int, factor: float | None) -> int:
    return room(tokens, 1, experts, factor)


def _twice_the_mean(tokens: int, k: int, experts: int, factor: float | None) -> int:
    """Without a factor there is room for twice the mean load only."""
    return room(tokens, k, experts, factor or 2.0)


def _first(expert_S: Tensor, weight_S: Tensor, rows: int) -> Tensor:
    before = (expert_S[:, None] == expert_S).tril(-1)
    return before.sum(1) < rows


def _no_weights(x_TD: Tensor, w_EDF: Tensor, s: Slots, k: int) -> Tensor:
    return output(x_TD, w_EDF, Slots(s.expert_S, torch.ones_like(s.weight_S), s.kept_S), k)


def _no_gradient_of_weights(x_TD: Tensor, w_EDF: Tensor, s: Slots, k: int) -> Tensor:
    return output(x_TD, w_EDF, Slots(s.expert_S, s.weight_S.detach(), s.kept_S), k)


def _kept_weights_sum_to_the_same(x_TD: Tensor, w_EDF: Tensor, s: Slots, k: int) -> Tensor:
    """A token's kept slots take over the weights of its dropped ones."""
    weight_TK = s.weight_S.unflatten(0, (-1, k))
    kept_TK = weight_TK * s.kept_S.unflatten(0, (-1, k))
    share = weight_TK.sum(1, keepdim=True) / kept_TK.sum(1, keepdim=True).clamp(min=1e-12)
    return output(x_TD, w_EDF, Slots(s.expert_S, (kept_TK * share).flatten(), s.kept_S), k)


def _experts_in_use(x_TD: Tensor, w_EDF: Tensor, s: Slots, k: int) -> Tensor:
    """Counts the experts that have slots: an expert without slots shifts all later ones."""
    number_S = s.expert_S.unique(return_inverse=True)[1]
    return output(x_TD, w_EDF, Slots(number_S, s.weight_S, s.kept_S), k)


def _in_the_order_of_experts(x_TD: Tensor, w_EDF: Tensor, s: Slots, k: int) -> Tensor:
    """Weights are not in the order of the outputs."""
    return output(x_TD, w_EDF, Slots(s.expert_S, s.weight_S[s.expert_S.argsort()], s.kept_S), k)


def _kept_load(scores_TE: Tensor, s: Slots) -> Tensor:
    return balance(scores_TE, s.expert_S[s.kept_S])


def _mean_scores(scores_TE: Tensor, s: Slots) -> Tensor:
    """f is the mean score."""
    return scores_TE.shape[1] * (scores_TE * scores_TE.mean(0)).sum()


def _without_experts(scores_TE: Tensor, s: Slots) -> Tensor:
    return balance(scores_TE, s.expert_S) / scores_TE.shape[1]


def _no_gradient_of_scores(scores_TE: Tensor, s: Slots) -> Tensor:
    return balance(scores_TE.detach(), s.expert_S) + 0 * scores_TE.sum()


def _slots(**changes: Callable) -> Mixture:
    def choose(scores_TE: Tensor, k: int, factor: float | None) -> Slots:
        return slots(scores_TE, k, factor, **changes)

    return changed(choose)


RIGHT: tuple[Mixture, ...] = (loop, dense)
MUTANTS: tuple[Mixture, ...] = (
    _slots(rows=_rounded_down),
    _slots(rows=_without_k),
    _slots(rows=_twice_the_mean),
    _slots(keep=_first),
    changed(out=_no_weights),
    changed(out=_no_gradient_of_weights),
    changed(out=_kept_weights_sum_to_the_same),
    changed(out=_experts_in_use),
    changed(out=_in_the_order_of_experts),
    changed(loss=_kept_load),
    changed(loss=_mean_scores),
    changed(loss=_without_experts),
    changed(loss=_no_gradient_of_scores),
)
