"""The divergence between the words of two models, over a vocabulary that is sharded over tp, a
chunk of tokens at a time.

With p the teacher's and q the student's probabilities of a token at a temperature t, the forward
divergence is ``KL(p || q)`` and the reverse one ``KL(q || p)``. As in ``cross_entropy``, the
gradient of the student's logits z is known as soon as the logits are, so forward computes it:

    forward   (q - p) / t
    reverse   q (log q - log p - KL(q || p)) / t

Both divergences are multiplied by t^2, so that their gradients do not shrink with the temperature
(Hinton et al. 2015, arXiv:1503.02531, section 2). Logits of two models exist for one chunk at a
time. Nothing of size ``[T, V]`` ever exists.
"""

from __future__ import annotations

from dataclasses import dataclass
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
from dtron.layers.token_log_probs import log_sum_exp, target_logits
from dtron.mesh import Layout


@dataclass(frozen=True)
class Divergence:
    """How a student learns from a teacher.

    ``temperature``: divides the logits of both.
    ``weight``: the weight of the divergence; the rest is the weight of the cross entropy.
    ``reverse``: the reverse divergence, and not the forward one.
    ``teacher_softcap``: the soft-cap of the teacher's logits (None: none)."""

    temperature: float
    weight: float
    reverse: bool
    teacher_softcap: float | None = None


def distillation_loss(
    x_TD: Tensor,
    w_head: Tensor,
    targets_T: Tensor,
    teacher: tuple[Tensor, Tensor],
    rule: Divergence,
    loss: Loss,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(loss, cross entropy, divergence)``: scalars, sums over tokens that are pending over
    the ranks' tokens. Tokens whose target is IGNORE do not count. Only the loss is differentiable:

        loss = (1 - weight) * cross entropy + weight * temperature^2 * divergence

    ``teacher``: the input of the teacher's head and its head, ``[T@tokens, E]`` and ``[V@vocab,
        E]``; or its largest logits and their words, ``[T@tokens, k]`` each. The teacher's other
        words then have probability 0."""
    x_TD = layout.constrain(x_TD, "tokens", "act_embed")  # all-gather over tp
    loss = with_chunk(loss, x_TD, w_head, layout)
    ids_V = layout.iota("vocab", w_head.shape[0], w_head.device)
    top = not teacher[1].is_floating_point()
    second = ("tokens", None) if top else ("vocab", "act_embed")

    def on_rank(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _ChunkedDivergence.apply(*tensors, top, rule, loss, layout)

    ins = (
        ("tokens", "act_embed"),
        ("vocab", "act_embed"),
        ("tokens",),
        ("vocab",),
        ("tokens", None),
        second,
    )
    region = layout.local_map(on_rank, ins, [("+tokens",)] * 3)
    return region(x_TD, w_head, targets_T, ids_V, *teacher)


def largest_logits(
    x_TD: Tensor, w_head: Tensor, k: int, loss: Loss, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Return the ``k`` largest logits of each token and their words, ``[T@tokens, k]`` each. Not
    differentiable. Every rank of tp must have ``k`` words (``fewest_words``)."""
    x_TD = layout.constrain(x_TD, "tokens", "act_embed")  # all-gather over tp
    loss = with_chunk(loss, x_TD, w_head, layout)
    ids_V = layout.iota("vocab", w_head.shape[0], w_head.device)
    parts = layout.parts("vocab")
    width = -(-w_head.shape[0] // parts)  # words of a rank; the last rank may have fewer

    def on_rank(x_TD: Tensor, w_VD: Tensor, ids_V: Tensor) -> tuple[Tensor, Tensor]:
        values, words = [], []
        # A rank's part of a row of all candidates. A sum over tp concatenates the parts.
        place = ids_V[0] // width * k + torch.arange(k, device=ids_V.device)
        for x_CD in x_TD.split(loss.chunk):
            best, at = chunk_logits(x_CD, w_VD, ids_V, loss).topk(k)
            best = best.clamp(min=torch.finfo(best.dtype).min)  # -inf times 0 is NaN in a sum
            both = torch.stack([best, ids_V[at].to(best.dtype)])
            room = both.new_zeros(2, len(x_CD), parts * k)
            both = layout.all_reduce(room.index_copy(2, place, both), "vocab")
            best, at = both[0].topk(k)
            values.append(best)
            words.append(both[1].gather(1, at).long())
        return torch.cat(values), torch.cat(words)

    ins = (("tokens", "act_embed"), ("vocab", "act_embed"), ("vocab",))
    outs: list[Any] = [("tokens", None), ("tokens", None)]
    return layout.local_map(on_rank, ins, outs)(x_TD, w_head, ids_V)


def fewest_words(words: int, parts: int) -> int:
    """Return the number of words of the last rank of tp, which has the fewest.

    ``words``: the rows of the head.
    ``parts``: the size of tp."""
    return words - -(-words // parts) * (parts - 1)


class _ChunkedDivergence(torch.autograd.Function):
    """The loss on one rank. Rank-local, except for small all-reduces over tp per chunk in
    forward."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        w_VD: Tensor,
        targets_T: Tensor,
        ids_V: Tensor,
        teacher_T: Tensor,
        teacher_V: Tensor,
        top: bool,
        rule: Divergence,
        loss: Loss,
        layout: Layout,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide, t = torch.promote_types(x_TD.dtype, torch.float32), rule.temperature
        entropy = torch.zeros((), dtype=wide, device=x_TD.device)
        divergence = torch.zeros_like(entropy)
        of_head = ctx.needs_input_grad[1]  # not where the head is frozen
        train = of_head or ctx.needs_input_grad[0]
        dx: list[Tensor] = []
        dw = torch.zeros_like(w_VD, dtype=wide) if of_head else None
        columns = [x_TD, targets_T, teacher_T, *([teacher_V] if top else [])]
        for x_CD, targets_C, *of_teacher in zip(
            *(x.split(loss.chunk) for x in columns), strict=True
        ):
            logits_CV = chunk_logits(x_CD, w_VD, ids_V, loss)
            if top:
                teacher_CV = _from_largest(of_teacher[0], of_teacher[1], ids_V, logits_CV)
            else:
                capped = Loss(loss.vocab, softcap=rule.teacher_softcap)
                teacher_CV = chunk_logits(of_teacher[0], teacher_V, ids_V, capped).to(wide)
            counts = targets_C != IGNORE
            # The cross entropy.
            target_C = target_logits(logits_CV, targets_C, ids_V, layout)
            log_sum_C = log_sum_exp(logits_CV, layout)
            entropy = entropy + ((log_sum_C - target_C) * counts).sum()
            # The divergence.
            q_CV = _log_softmax(logits_CV / t, layout)
            p_CV = _log_softmax(teacher_CV / t, layout)
            a_CV, b_CV = (q_CV, p_CV) if rule.reverse else (p_CV, q_CV)
            gap_CV = torch.where(a_CV.isinf(), 0, a_CV - b_CV)  # 0 log 0 is 0
            kl_C = layout.all_reduce((a_CV.exp() * gap_CV).sum(-1), "vocab")
            divergence = divergence + (kl_C * counts).sum()
            if not train:
                continue
            mine, place_C = own_words(targets_C, ids_V)
            d_CV = (logits_CV - log_sum_C[:, None]).exp()
            d_CV = d_CV.scatter_add(1, place_C[:, None], -mine[:, None].to(wide))
            slope_CV = (
                q_CV.exp() * (gap_CV - kl_C[:, None]) if rule.reverse else q_CV.exp() - p_CV.exp()
            )
            d_CV = (1 - rule.weight) * d_CV + rule.weight * t * slope_CV
            d_CV = uncapped_gradient(d_CV * counts[:, None], logits_CV, loss.softcap)
            d_CV = d_CV.to(x_TD.dtype)
            dx.append(d_CV @ w_VD)
            if dw is not None:
                dw += d_CV.mT @ x_CD
        if train:
            ctx.save_for_backward(torch.cat(dx), None if dw is None else dw.to(w_VD.dtype))
        total = (1 - rule.weight) * entropy + rule.weight * t * t * divergence
        ctx.mark_non_differentiable(entropy, divergence)
        return total, entropy, divergence

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        dx, dw = (None if d is None else d * g.to(d.dtype) for d in ctx.saved_tensors)
        return dx, dw, *(None,) * 8


def _log_softmax(logits_CV: Tensor, layout: Layout) -> Tensor:
    return logits_CV - log_sum_exp(logits_CV, layout)[:, None]


def _from_largest(values_Ck: Tensor, words_Ck: Tensor, ids_V: Tensor, like_CV: Tensor) -> Tensor:
    """Return this rank's logits of a chunk, given the largest ones; -inf for all other words."""
    mine, place_Ck = own_words(words_Ck, ids_V)
    values_Ck = values_Ck.to(like_CV.dtype).masked_fill(~mine, float("-inf"))
    # A word of another rank is put at place 0, where -inf changes no maximum.
    return torch.full_like(like_CV, float("-inf")).scatter_reduce(1, place_Ck, values_Ck, "amax")
