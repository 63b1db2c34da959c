"""The operators of the lightning indexer (DeepSeek-V3.2, arXiv:2512.02556): scores of keys, the
choice of the best keys, and the distribution of attention that the scores learn.

Each of these tensors has a number for every query and key: ``[S, S]`` for a row. A plain program
would also keep such a tensor for each head. So the operators take some queries at a time, and keep
nothing of a head. They are operators of their own: no compiler and no recomputed region looks into
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

NUMBERS_AT_ONCE = 1 << 27  # of a tensor with heads: 512 MiB in float32


def index_scores_reference(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Define the indexer's scores (equation 1): the score of query t and key s is the sum over
    heads j of w[t, j] * relu(q[t, j] . k[s]).

    ``q``: ``[B, S, N, H]``.
    ``k``: ``[B, K, H]``: all heads share a key.
    ``w``: ``[B, S, N]``, the weights of heads.
    Returns ``[B, S, K]``, in float32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    products = torch.einsum("bsnh,bkh->bsnk", q, k).to(wide)
    return (products.relu() * w.to(wide)[..., None]).sum(2)


def index_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Compute ``index_scores_reference``. Nothing but the inputs is kept for backward."""
    return _IndexScores.apply(q, k, w)


class _IndexScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, w)
        return _scores(q, k, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        return _scores_backward(g.contiguous(), *ctx.saved_tensors)


def _some(queries: int, numbers: int) -> Iterator[slice]:
    """Split queries, of which each has so many numbers in the largest tensor."""
    size = max(1, NUMBERS_AT_ONCE // numbers)
    return (slice(start, start + size) for start in range(0, queries, size))


@torch.library.custom_op("dtron::index_scores", mutates_args=())
def _scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    rows, queries, heads, _ = q.shape
    out = q.new_empty(rows, queries, k.shape[1], dtype=wide)
    for some in _some(queries, rows * heads * k.shape[1]):
        products = (q[:, some].transpose(1, 2) @ k[:, None].mT).to(wide).relu_()
        weights = w[:, some].transpose(1, 2).to(wide)
        out[:, some] = products.mul_(weights[..., None]).sum(1)
    return out


@_scores.register_fake
def _(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:2], k.shape[1], dtype=wide)


@torch.library.custom_op("dtron::index_scores_backward", mutates_args=())
def _scores_backward(g: Tensor, q: Tensor, k: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = g.dtype
    q_grad, w_grad = torch.empty_like(q), torch.empty_like(w)
    k_grad = torch.zeros_like(k, dtype=wide)
    rows, queries, heads, _ = q.shape
    for some in _some(queries, rows * heads * k.shape[1]):
        q_some, g_some = q[:, some].transpose(1, 2), g[:, some][:, None]
        products = (q_some @ k[:, None].mT).to(wide).relu_()
        w_grad[:, some] = (products * g_some).sum(-1).transpose(1, 2).to(w.dtype)
        weights = w[:, some].transpose(1, 2).to(wide)[..., None]
        inner = ((products > 0) * g_some * weights).to(q.dtype)
        q_grad[:, some] = (inner @ k[:, None]).transpose(1, 2)
        k_grad += (inner.mT @ q_some).sum(1)
    return q_grad, k_grad.to(k.dtype), w_grad


@_scores_backward.register_fake
def _(g: Tensor, q: Tensor, k: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(w)


@torch.library.custom_op("dtron::select_keys", mutates_args=())
def select_keys(scores_TS: Tensor, k: int) -> Tensor:
    """Return whether a key is one of the k best of a query: ``[T, S]``. Of equal scores, the first
    keys are selected. So the choice is the same on every mesh. A key of score -inf is never
    selected."""
    out = torch.empty_like(scores_TS, dtype=torch.bool)
    for some in _some(*scores_TS.shape):
        scores = scores_TS[some]
        least = scores.topk(k, dim=-1).values.amin(-1, keepdim=True)
        above, equal = scores > least, (scores == least) & (scores > float("-inf"))
        room = k - above.sum(-1, keepdim=True)
        out[some] = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))
    return out


@select_keys.register_fake
def _(scores_TS: Tensor, k: int) -> Tensor:
    return torch.empty_like(scores_TS, dtype=torch.bool)


@torch.library.custom_op("dtron::attention_weights", mutates_args=())
def attention_weights(
    q: Tensor, k: Tensor, sees: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Return the weights of attention summed over heads: ``[B, S, K]``, in float32 at least. They
    have no gradient.

    ``q``, ``k``: ``[B, N, S, H]`` and ``[B, N, K, H]``.
    ``sees [B or 1, S, K]``: the keys that a query sees."""
    wide = torch.promote_types(q.dtype, torch.float32)
    rows, heads, queries, _ = q.shape
    out = q.new_empty(rows, queries, k.shape[2], dtype=wide)
    for some in _some(queries, rows * heads * k.shape[2]):
        scores = (q[:, :, some] @ k.mT).to(wide) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~sees[:, None, some], float("-inf"))
        out[:, some] = scores.softmax(-1).sum(1)
    return out


@attention_weights.register_fake
def _(q: Tensor, k: Tensor, sees: Tensor, scale: float, softcap: float | None) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(len(q), q.shape[2], k.shape[2], dtype=wide)


def divergence(scores_TS: Tensor, weights_TS: Tensor, sees_TS: Tensor) -> Tensor:
    """Return the divergence KL(p || softmax(scores)) of each query over the keys that it sees
    (equations 3 and 4), ``[T]``: p is the normalised ``weights_TS``, which is a constant."""
    p = weights_TS / weights_TS.sum(-1, keepdim=True)
    log_q = scores_TS.masked_fill(~sees_TS, float("-inf")).log_softmax(-1)
    seen = p > 0
    log_q = log_q.masked_fill(~seen, 0)  # -inf times 0 is no number
    return (torch.xlogy(p, p) - p * log_q).sum(-1)
