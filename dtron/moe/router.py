"""The router: chooses the experts of each token and keeps their load even.

A token's logits are its matmul with the router's matrix. Scores are the softmax or sigmoid of
the logits. The token goes to its top k experts (Shazeer et al. 2017, arXiv:1701.06538).
DeepSeek-V3 (arXiv:2412.19437, section 2.1.2) first chooses the best groups of experts, so that a
token is sent to few nodes. The router computes in float32 at least, because score differences
that decide the choice can be smaller than the precision of bfloat16.

Scores alone do not balance the load. Three terms can be added:

- The auxiliary loss (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6): per token, ``E
  sum_e f_e p_e``, where f_e is the fraction of the load of expert e and p_e the token's score.
  The loss is 1 if the load is even, and more otherwise. The *level* of the loss is the set of
  tokens over which f is counted: a microbatch, of all ranks; each sequence (DeepSeek-V3,
  equations 17 to 20); or the step so far, i.e. every microbatch up to this one (Qiu et al. 2025,
  arXiv:2501.11873: the larger the set, the freer experts are to specialise).
- A bias on the scores that affects only the choice (Wang et al. 2024, arXiv:2408.15664). After
  each step the bias increases for experts with less than the mean load and decreases for experts
  with more. The optimizer does not update the bias.
- The z-loss (Zoph et al. 2022, arXiv:2202.08906, equation 5), which keeps logits small.

Losses are sums over tokens, like the main loss, and are divided once by the same count. A token
whose target is ignored adds to no loss and no load, but it goes to experts like any other token. A
capacity limit is different: there a token on which no loss depends, such as padding, is not sent,
because it would take the room of another token.
f is counted over all ranks that have tokens: one all-reduce of E numbers per layer (none without
an auxiliary loss)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dtron.mesh import Layout
from dtron.moe.config import MoEConfig
from dtron.params import weight, zeros


@dataclass(frozen=True)
class Router:
    """The router's params. ``balance`` affects only the choice of experts; see
    ``update_router_bias``."""

    w: Tensor = weight("embed", "act_experts", fan_in=1)
    b: Tensor | None = weight("act_experts", init=zeros, when="router_bias")
    balance: Tensor | None = weight("act_experts", init=zeros, when="balance_bias", buffer=True)


class TokenInfo(NamedTuple):
    """Token data for the router and its losses, ``[T@tokens_sp]``.

    ``valid_T``: whether the token counts.
    ``rows_T``: the token's sequence, an index below ``rows``.
    ``rows``: the number of sequences.
    ``place_T``: the token's position among the tokens of all rows, for forced balance.
    ``needed_T``: whether a loss depends on the token, see ``Batch`` (None: all tokens may be
        sent)."""

    valid_T: Tensor
    rows_T: Tensor
    rows: int
    place_T: Tensor | None = None
    needed_T: Tensor | None = None


class Routed(NamedTuple):
    """The router's output. The last three fields are sums over tokens, pending.

    ``weights_TK``: ``[T@tokens_sp, K]``, the factors of the experts' outputs.
    ``index_TK``: ``[T@tokens_sp, K]``, the experts of each token; the number of experts for a token
        that is not sent.
    ``aux``: a term of the loss.
    ``load_E``: tokens per expert.
    ``totals``: sums of ``TOTALS``."""

    weights_TK: Tensor
    index_TK: Tensor
    aux: Tensor
    load_E: Tensor
    totals: Tensor


TOTALS = ("tokens", "entropy", "aux_loss", "z_loss", "sent")  # tokens that count, ..., tokens sent


def route(
    p: Router,
    x_TD: Tensor,
    info: TokenInfo,
    c: MoEConfig,
    layout: Layout,
    before_E: Tensor | None = None,
) -> Routed:
    """Route ``x_TD [T@tokens_sp, D]``.

    ``before_E``: the load of the step so far, for the auxiliary loss of level ``global_batch``."""
    token, chosen, total = ("tokens_sp",), ("tokens_sp", None), ("+tokens_sp",)
    weights = ((None, "act_experts"), ("act_experts",), ("act_experts",))

    def on_rank(
        x_TD: Tensor,
        w: Tensor,
        b: Tensor | None,
        balance: Tensor,
        valid_T: Tensor,
        rows_T: Tensor,
        place_T: Tensor | None,
        needed_T: Tensor | None,
        before_E: Tensor | None,
    ) -> tuple[Tensor, ...]:
        own = TokenInfo(valid_T, rows_T, info.rows, place_T, needed_T)
        return _route(Router(w, b, balance), x_TD, own, before_E, c, layout)

    region = layout.local_map(
        on_rank,
        (("tokens_sp", None), *weights, token, token, token, token, total),
        [chosen, chosen, total, total, total],
    )
    valid_T, rows_T, _, place_T, needed_T = info
    return Routed(*region(x_TD, p.w, p.b, p.balance, valid_T, rows_T, place_T, needed_T, before_E))


def _route(
    p: Router,
    x_TD: Tensor,
    info: TokenInfo,
    before_E: Tensor | None,
    c: MoEConfig,
    layout: Layout,
) -> tuple[Tensor, ...]:
    """Return the fields of ``Routed``. Rank-local, except for the counts of the auxiliary loss."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    logits_TE = x_TD.to(wide) @ p.w.to(wide)
    if p.b is not None:
        logits_TE = logits_TE + p.b.to(wide)
    scores_TE = logits_TE.sigmoid() if c.score == "sigmoid" else logits_TE.softmax(-1)
    with torch.no_grad():
        if c.balanced:
            assert info.place_T is not None
            next_K = torch.arange(c.top_k, device=x_TD.device)
            index_TK = (info.place_T[:, None] * c.top_k + next_K) % c.experts
        else:
            index_TK = choose(scores_TE, p.balance, c)
        chosen_TE = torch.zeros_like(scores_TE).scatter(1, index_TK, 1.0) * info.valid_T[:, None]
    # The share of a score in a sum of scores. Scores of very negative logits are all zero, and
    # their sum too; the softmax of their logarithms is never 0 / 0.
    log_TE = F.logsigmoid(logits_TE) if c.score == "sigmoid" else logits_TE
    if c.score == "topk_softmax" or c.normalize:
        weights_TK = log_TE.gather(1, index_TK).softmax(-1)
    else:
        weights_TK = scores_TE.gather(1, index_TK)
    weights_TK = weights_TK * c.scale

    share_TE = log_TE.softmax(-1) if c.score == "sigmoid" else scores_TE
    aux = z = torch.zeros((), dtype=wide, device=x_TD.device)
    if c.aux_loss:
        with torch.no_grad():
            f_TE = _fractions(chosen_TE, info, before_E, c, layout)
        aux = (c.experts * share_TE * f_TE * info.valid_T[:, None]).sum()
    if c.z_loss:
        z = (logits_TE.logsumexp(-1).square() * info.valid_T).sum()
    with torch.no_grad():
        entropy = -(torch.xlogy(share_TE, share_TE).sum(-1) * info.valid_T).sum()
        sent = torch.ones_like(info.valid_T) if info.needed_T is None else info.needed_T
        totals = torch.stack([info.valid_T.sum().to(wide), entropy, aux, z, sent.sum().to(wide)])
        if info.needed_T is not None:
            index_TK = torch.where(sent[:, None], index_TK, c.experts)
    return weights_TK, index_TK, c.aux_loss * aux + c.z_loss * z, chosen_TE.sum(0), totals


def choose(scores_TE: Tensor, balance: Tensor | None, c: MoEConfig) -> Tensor:
    """Return the experts of each token: ``[T, K]``. The score of a group is the sum of its two best
    scores if scores are sigmoids (DeepSeek-V3), and its best score if scores are a softmax
    (DeepSeek-V2)."""
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
    info: TokenInfo,
    before_E: Tensor | None,
    c: MoEConfig,
    layout: Layout,
) -> Tensor:
    """Return each expert's fraction of the load in the token's set: ``[T, E]``, or ``[1, E]`` if
    all tokens have one set. Communicates E numbers (per sequence at level ``sequence``)."""
    if c.aux_level == "sequence":
        counts = chosen_TE.new_zeros(info.rows, chosen_TE.shape[1])
        counts = counts.index_add(0, info.rows_T, chosen_TE)
    else:
        counts = chosen_TE.sum(0, keepdim=True)
        if before_E is not None:
            counts = counts + before_E.to(counts.dtype)
    counts = layout.all_reduce(counts, "tokens_sp")
    f = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return f[info.rows_T] if c.aux_level == "sequence" else f
