"""Cross entropy over a vocabulary that is sharded over tp, a chunk of tokens at a time.

The logits of a batch are its largest tensor: 8,192 tokens by 128,256 words in float32 are 4 GB. Two
splits keep the logits small. Over tp, each rank has the logits of its own words only. The softmax
needs three numbers per token from the other ranks: the maximum, the sum of exponentials and the
target's logit (Shoeybi et al. 2019, arXiv:1909.08053, section 3). Over tokens, a chunk's logits
exist only while their gradient is computed. This gradient (softmax minus one-hot) is known as soon
as the logits are. So forward computes the gradients of x and of the head at once, and backward only
scales them. Nothing is recomputed, and nothing of size ``[T, V]`` ever exists.

The loss is a *sum* over tokens. The training step divides it once, by the count of the whole global
batch. This one definition is right for data and context parallelism, microbatches and uneven masks.

z-loss (PaLM, arXiv:2204.02311, section 5) adds ``z * logsumexp^2`` per token. It is in the gradient
and not in the returned loss. So a run logs its cross entropy, with and without z-loss. The sum of
``logsumexp^2`` is returned beside it.

A soft-cap bounds the logits: ``cap * tanh(logits / cap)`` (Gemma 2, arXiv:2408.00118, section 2).
It works on each logit alone, so it communicates nothing. Everything else is computed from the
bounded logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dtron.mesh import Layout

IGNORE = -100  # a target that does not count


@dataclass(frozen=True)
class Loss:
    """Settings of the loss.

    ``vocab``: the number of words. Further logits are padding.
    ``chunk``: the number of tokens whose logits exist at once; None: tokens for 2^27 logits (0.5
        GiB in float32), and half of the tokens at most.
    ``z``: the weight of z-loss.
    ``softcap``: the bound of logits (None: no bound)."""

    vocab: int
    chunk: int | None = None
    z: float = 0.0
    softcap: float | None = None


def cross_entropy(
    x_TD: Tensor, w_head: Tensor, targets_T: Tensor, loss: Loss, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Return the cross entropy of ``x_TD [T@tokens_sp, D]`` with the head ``w_head [V@vocab, D]``
    and the z-loss without its weight (0 if the weight is 0). Both are sums over tokens: scalars,
    whose sum over the ranks' tokens is still pending. Tokens whose target is IGNORE do not count.

    The gradient of the cross entropy includes the gradient of the z-loss, times ``loss.z``. The
    z-loss itself is not differentiable."""
    x_TD = layout.constrain(x_TD, "tokens", "act_embed")  # all-gather over tp
    loss = with_chunk(loss, x_TD, w_head, layout)
    ids_V = layout.iota("vocab", w_head.shape[0], w_head.device)

    def on_rank(
        x_TD: Tensor, w_VD: Tensor, targets_T: Tensor, ids_V: Tensor
    ) -> tuple[Tensor, Tensor]:
        return _ChunkedLoss.apply(x_TD, w_VD, targets_T, ids_V, loss, layout)

    region = layout.local_map(
        on_rank,
        (("tokens", "act_embed"), ("vocab", "act_embed"), ("tokens",), ("vocab",)),
        [("+tokens",), ("+tokens",)],
    )
    return region(x_TD, w_head, targets_T, ids_V)


def with_chunk(loss: Loss, x_TD: Tensor, w_head: Tensor, layout: Layout) -> Loss:
    """Return the settings with a number of tokens in ``chunk``."""
    if loss.chunk is not None:
        return loss
    words = w_head.shape[0] // layout.parts("vocab")
    tokens = x_TD.shape[0] // layout.parts("tokens")
    return replace(loss, chunk=max(1, min(2**27 // words, (tokens + 1) // 2)))


def chunk_logits(x_CD: Tensor, w_VD: Tensor, ids_V: Tensor, loss: Loss) -> Tensor:
    """Compute the logits ``[C, V]`` of a chunk of tokens, in float32 at least. Padding of the
    vocabulary has -inf. Rank-local."""
    wide = torch.promote_types(x_CD.dtype, torch.float32)
    logits_CV = soft_cap((x_CD @ w_VD.mT).to(wide), loss.softcap)
    return logits_CV.masked_fill(ids_V >= loss.vocab, float("-inf"))


def uncapped_gradient(d_CV: Tensor, logits_CV: Tensor, cap: float | None) -> Tensor:
    """Return the gradient of the logits before their soft-cap, given that of the bounded ones."""
    if cap is None:
        return d_CV
    tanh_CV = (logits_CV / cap).clamp(min=-1)  # the derivative of tanh is 0 for padding
    return d_CV * (1 - tanh_CV.square())


def own_words(targets_C: Tensor, ids_V: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(mine, place)``: whether each target is one of this rank's words, and its place
    among them (0 if it is not)."""
    mine = (targets_C >= ids_V[0]) & (targets_C <= ids_V[-1])
    return mine, (targets_C - ids_V[0]) * mine


def over_all(loss: Tensor, layout: Layout) -> Tensor:
    """Return the same loss as a sum that is pending over tp too. ``loss`` is replicated over tp,
    and each rank's result is a summand. So it can be added to sums over the residual stream's
    tokens."""
    n = layout.parts("tokens_sp") // layout.parts("tokens")

    def summand(x: Tensor) -> Tensor:
        # Divides the value, but not the gradient: each summand has the gradient of the sum.
        return x + (x.detach() / n - x.detach())

    return layout.local_map(summand, [("+tokens",)], ("+tokens_sp",))(loss)


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """Bound logits by tanh to (-cap, cap)."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def logits(
    x_TD: Tensor, w_head: Tensor, vocab: int, layout: Layout, softcap: float | None = None
) -> Tensor:
    """Return all logits ``[T@tokens, vocab]`` of a few tokens: for sampling and tests, not for
    training."""
    x_TD = layout.constrain(x_TD, "tokens", "act_embed")  # all-gather over tp
    logits_TV = (x_TD @ w_head.mT).to(torch.promote_types(x_TD.dtype, torch.float32))  # local
    logits_TV = soft_cap(logits_TV, softcap)
    return layout.constrain(logits_TV, "tokens", None)[:, :vocab]  # all-gather over tp


class _ChunkedLoss(torch.autograd.Function):
    """The loss on one rank. Rank-local, except for two small all-reduces over tp per chunk in
    forward."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        w_VD: Tensor,
        targets_T: Tensor,
        ids_V: Tensor,
        loss: Loss,
        layout: Layout,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=x_TD.device)
        z_total = torch.zeros_like(total)
        of_x, of_w = ctx.needs_input_grad[:2]
        dx: list[Tensor] = []
        dw = torch.zeros_like(w_VD, dtype=wide) if of_w else None  # not where the head is frozen
        chunks = zip(x_TD.split(loss.chunk), targets_T.split(loss.chunk), strict=True)
        for x_CD, targets_C in chunks:
            logits_CV = chunk_logits(x_CD, w_VD, ids_V, loss)
            top_C = layout.all_reduce(logits_CV.amax(-1), "vocab", "max")
            exp_CV = (logits_CV - top_C[:, None]).exp()
            counts = targets_C != IGNORE
            mine, place_C = own_words(targets_C, ids_V)
            target_C = torch.where(mine, logits_CV.gather(1, place_C[:, None])[:, 0], 0)
            sums = layout.all_reduce(torch.stack([exp_CV.sum(-1), target_C]), "vocab")
            sum_C, target_C = sums.unbind()
            logsum_C = top_C + sum_C.log()
            total = total + ((logsum_C - target_C) * counts).sum()
            if loss.z:
                z_total = z_total + (logsum_C.square() * counts).sum()
            if of_x or dw is not None:
                slope_C = (1 + 2 * loss.z * logsum_C) / sum_C * counts
                d_CV = exp_CV * slope_C[:, None]
                d_CV.scatter_add_(1, place_C[:, None], -mine[:, None].to(wide))
                d_CV = uncapped_gradient(d_CV, logits_CV, loss.softcap).to(x_TD.dtype)
                if of_x:
                    dx.append(d_CV @ w_VD)
                if dw is not None:
                    dw += d_CV.mT @ x_CD
        ctx.save_for_backward(
            torch.cat(dx) if of_x else None, None if dw is None else dw.to(w_VD.dtype)
        )
        ctx.mark_non_differentiable(z_total)
        return total, z_total

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        dx, dw = (None if d is None else d * g.to(d.dtype) for d in ctx.saved_tensors)
        return dx, dw, None, None, None, None
