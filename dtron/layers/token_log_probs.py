"""Log-probabilities of tokens, over a vocabulary that is sharded over tp, a chunk of tokens at a
time.

``cross_entropy`` computes its gradient in forward, because the loss is a plain sum of
log-probabilities. Other losses are functions of sums over a sequence, such as DPO. The gradient of
each log-probability is then known only in backward. So forward keeps one number per token, the
logarithm of the sum of exponentials. Backward computes a chunk's logits again from it, and
communicates nothing. Nothing of size ``[T, V]`` ever exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dtron.layers.cross_entropy import (
    IGNORE,
    Loss,
    chunk_logits,
    own_words,
    uncapped_gradient,
    with_chunk,
)
from dtron.mesh import Layout


def token_log_probs(
    x_TD: Tensor, w_head: Tensor, targets_T: Tensor, loss: Loss, layout: Layout
) -> Tensor:
    """Return the log-probability of each target, ``[T@tokens]``, in float32 at least; 0 where the
    target is IGNORE. Differentiable by x and the head.

    ``x_TD``: ``[T@tokens_sp, D]``, the input of the head.
    ``w_head``: ``[V@vocab, D]``."""
    x_TD = layout.constrain(x_TD, "tokens", "act_embed")  # all-gather over tp
    loss = with_chunk(loss, x_TD, w_head, layout)
    ids_V = layout.iota("vocab", w_head.shape[0], w_head.device)

    def on_rank(x_TD: Tensor, w_VD: Tensor, targets_T: Tensor, ids_V: Tensor) -> Tensor:
        return _TokenLogProbs.apply(x_TD, w_VD, targets_T, ids_V, loss, layout)

    ins = (("tokens", "act_embed"), ("vocab", "act_embed"), ("tokens",), ("vocab",))
    return layout.local_map(on_rank, ins, ("tokens",))(x_TD, w_head, targets_T, ids_V)


def log_sum_exp(logits_CV: Tensor, layout: Layout) -> Tensor:
    """Return the logarithm of the sum of exponentials over the whole vocabulary, ``[C]``: inside a
    local region, by two all-reduces over tp."""
    top_C = layout.all_reduce(logits_CV.amax(-1), "vocab", "max")
    return top_C + layout.all_reduce((logits_CV - top_C[:, None]).exp().sum(-1), "vocab").log()


def target_logits(logits_CV: Tensor, targets_C: Tensor, ids_V: Tensor, layout: Layout) -> Tensor:
    """Return the logit of each target, ``[C]``: inside a local region, by an all-reduce over tp."""
    mine, place_C = own_words(targets_C, ids_V)
    own_C = torch.where(mine, logits_CV.gather(1, place_C[:, None])[:, 0], 0)
    return layout.all_reduce(own_C, "vocab")


class _TokenLogProbs(torch.autograd.Function):
    """The log-probabilities on one rank. Rank-local, except for three small all-reduces over tp
    per chunk in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        w_VD: Tensor,
        targets_T: Tensor,
        ids_V: Tensor,
        loss: Loss,
        layout: Layout,
    ) -> Tensor:
        found, log_sums = [], []
        for x_CD, targets_C in zip(
            x_TD.split(loss.chunk), targets_T.split(loss.chunk), strict=True
        ):
            logits_CV = chunk_logits(x_CD, w_VD, ids_V, loss)
            target_C = target_logits(logits_CV, targets_C, ids_V, layout)
            log_sums.append(log_sum_exp(logits_CV, layout))
            found.append((target_C - log_sums[-1]) * (targets_C != IGNORE))
        ctx.loss = loss
        ctx.save_for_backward(x_TD, w_VD, targets_T, ids_V, torch.cat(log_sums))
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, g_T: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, w_VD, targets_T, ids_V, log_sum_T = ctx.saved_tensors
        loss, dx = ctx.loss, []
        of_head = ctx.needs_input_grad[1]  # not where the head is frozen
        dw = torch.zeros_like(w_VD, dtype=log_sum_T.dtype) if of_head else None
        g_T = g_T * (targets_T != IGNORE)
        columns = (x.split(loss.chunk) for x in (x_TD, targets_T, log_sum_T, g_T))
        for x_CD, targets_C, log_sum_C, g_C in zip(*columns, strict=True):
            logits_CV = chunk_logits(x_CD, w_VD, ids_V, loss)
            mine, place_C = own_words(targets_C, ids_V)
            d_CV = (logits_CV - log_sum_C[:, None]).exp() * -g_C[:, None]
            d_CV = d_CV.scatter_add(1, place_C[:, None], (mine * g_C)[:, None])
            d_CV = uncapped_gradient(d_CV, logits_CV, loss.softcap).to(x_TD.dtype)
            dx.append(d_CV @ w_VD)
            if dw is not None:
                dw += d_CV.mT @ x_CD
        return torch.cat(dx), None if dw is None else dw.to(w_VD.dtype), None, None, None, None
