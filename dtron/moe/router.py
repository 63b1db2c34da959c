"""Which token goes to which experts, and what keeps their load even.

A token's logits are its product with the router's matrix; scores are their softmax or sigmoid, and
the token goes to its top k (Shazeer et al. 2017, arXiv:1701.06538). DeepSeek-V3 (arXiv:2412.19437,
section 2.1.2) first takes the best groups of experts, so that a token is sent to few nodes. All in
float32 at least: experts are chosen by differences that bfloat16 does not have.

Nothing in this makes the load even, so something must be added:

- the auxiliary loss (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6): per token, ``E sum_e f_e p_e``,
  with the fraction f of the load that expert e has and the token's score p. It is 1 where the load is even
  and more where it is not. Its *level* is the set of tokens that f is counted over: a micro-batch, of all
  ranks; each sequence (DeepSeek-V3, equations 17 to 20); or the step so far, every micro-batch up to this
  one (Qiu et al. 2025, arXiv:2501.11873: the larger the set, the freer experts are to specialise);
- a bias on the scores that only chooses (Wang et al. 2024, arXiv:2408.15664): after each step, it goes up
  where an expert had less than the mean and down where it had more. It is no weight of the optimizer;
- z-loss (Zoph et al. 2022, arXiv:2202.08906, equation 5), which keeps logits small.

Losses are sums over tokens, like the main loss, and are divided once by the same count. A token
whose target does not count counts in none of this, though it goes to experts like any other. f is a
count over all ranks that have tokens: one all-reduce of E numbers per layer (none without an
auxiliary loss).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dtron.mesh import Layout
from dtron.moe.config import MoEConfig
from dtron.params import weight, zeros


@dataclass(frozen=True)
class Router:
    """``balance`` only chooses; see ``update_router_bias``."""

    w: Tensor = weight("embed", "act_experts")
    b: Tensor | None = weight("act_experts", init=zeros, when="router_bias")
    balance: Tensor | None = weight("act_experts", init=zeros, when="balance_bias", frozen=True)


class Routed(NamedTuple):
    """``weights_TK`` and ``index_TK [T@tokens_sp, K]``: a token's experts and what their outputs
    are multiplied by. ``aux``: what is added to the loss. ``load_E``: tokens per expert.
    ``totals``: of tokens, entropies, auxiliary losses and z-losses, in that order. The last three
    are sums over tokens, pending."""

    weights_TK: Tensor
    index_TK: Tensor
    aux: Tensor
    load_E: Tensor
    totals: Tensor


TOTALS = ("tokens", "entropy", "aux_loss", "z_loss")


def route(
    p: Router,
    x_TD: Tensor,
    valid_T: Tensor,
    rows_T: Tensor,
    rows: int,
    c: MoEConfig,
    layout: Layout,
    before_E: Tensor | None = None,
    place_T: Tensor | None = None,
) -> Routed:
    """``x_TD [T@tokens_sp, D]``. ``valid_T``: whether a token counts; ``rows_T``: its sequence, of ``rows``.
    ``before_E``: the load of the step so far, for the auxiliary loss of that level. ``place_T``:
    of a token among all, for forced balance."""
    ins = (
        ("tokens_sp", None), (None, "act_experts"), ("act_experts",), ("act_experts",),
        ("tokens_sp",), ("tokens_sp",), ("tokens_sp",), ("+tokens_sp",),
    )  # fmt: skip
    chosen, total = ("tokens_sp", None), ("+tokens_sp",)
    region = layout.local(
        lambda *args: _route(*args, rows, c, layout), ins, [chosen, chosen, total, total, total]
    )
    return Routed(*region(x_TD, p.w, p.b, p.balance, valid_T, rows_T, place_T, before_E))


def _route(
    x_TD: Tensor,
    w: Tensor,
    b: Tensor | None,
    balance: Tensor | None,
    valid_T: Tensor,
    rows_T: Tensor,
    place_T: Tensor | None,
    before_E: Tensor | None,
    rows: int,
    c: MoEConfig,
    layout: Layout,
) -> tuple[Tensor, ...]:
    """Rank-local, but for the counts of the auxiliary loss."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    logits_TE = x_TD.to(wide) @ w.to(wide)
    if b is not None:
        logits_TE = logits_TE + b.to(wide)
    scores_TE = logits_TE.sigmoid() if c.score == "sigmoid" else logits_TE.softmax(-1)
    with torch.no_grad():
        if c.balanced:
            index_TK = (
                place_T[:, None] * c.top_k + torch.arange(c.top_k, device=w.device)
            ) % c.experts
        else:
            index_TK = choose(scores_TE, balance, c)
        chosen_TE = torch.zeros_like(scores_TE).scatter(1, index_TK, 1.0) * valid_T[:, None]
    weights_TK = (logits_TE if c.score == "topk_softmax" else scores_TE).gather(1, index_TK)
    if c.score == "topk_softmax":
        weights_TK = weights_TK.softmax(-1)
    elif c.normalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    weights_TK = weights_TK * c.scale

    share_TE = scores_TE / scores_TE.sum(-1, keepdim=True) if c.score == "sigmoid" else scores_TE
    aux = z = torch.zeros((), dtype=wide, device=w.device)
    if c.aux_loss:
        with torch.no_grad():
            f_TE = _fractions(chosen_TE, rows_T, before_E, rows, c, layout)
        aux = (c.experts * share_TE * f_TE * valid_T[:, None]).sum()
    if c.z_loss:
        z = (logits_TE.logsumexp(-1).square() * valid_T).sum()
    with torch.no_grad():
        entropy = -(torch.xlogy(share_TE, share_TE).sum(-1) * valid_T).sum()
        totals = torch.stack([valid_T.sum().to(wide), entropy, aux, z])
    return weights_TK, index_TK, c.aux_loss * aux + c.z_loss * z, chosen_TE.sum(0), totals


def choose(scores_TE: Tensor, balance: Tensor | None, c: MoEConfig) -> Tensor:
    """``[T, K]``: the experts of each token. The score of a group is the sum of its two best experts where
    scores are sigmoids (DeepSeek-V3) and that of its best where they are a softmax (DeepSeek-V2)."""
    if balance is not None:
        scores_TE = scores_TE + balance.to(scores_TE.dtype)
    if c.groups > 1:
        grouped = scores_TE.unflatten(1, (c.groups, -1))
        best = min(2 if c.score == "sigmoid" else 1, grouped.shape[-1])
        group_TG = grouped.topk(best, -1).values.sum(-1)
        allowed = torch.zeros_like(group_TG, dtype=torch.bool)
        allowed = allowed.scatter(1, group_TG.topk(c.group_top_k, -1).indices, True)
        scores_TE = grouped.masked_fill(~allowed[:, :, None], float("-inf")).flatten(1)
    return scores_TE.topk(c.top_k, -1).indices


def _fractions(
    chosen_TE: Tensor,
    rows_T: Tensor,
    before_E: Tensor | None,
    rows: int,
    c: MoEConfig,
    layout: Layout,
) -> Tensor:
    """``[T, E]``, or ``[1, E]`` where it is the same for all tokens: the fraction of the load of a
    token's set that each expert has. Communicates E numbers (of each sequence)."""
    if c.aux_level == "sequence":
        counts = chosen_TE.new_zeros(rows, chosen_TE.shape[1]).index_add(0, rows_T, chosen_TE)
    else:
        counts = chosen_TE.sum(0, keepdim=True)
        if before_E is not None:
            counts = counts + before_E.to(counts.dtype)
    counts = layout.all_reduce(counts, "tokens_sp")
    f = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return f[rows_T] if c.aux_level == "sequence" else f
