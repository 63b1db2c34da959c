"""Attention in a plan, in the place of flex_attention.

torch's flex_attention takes gradients on GPUs only, even of fake tensors. So a plan calls an
operator of its own: it has the results of flex_attention, saves the same tensors for backward, and
says how many pairs of queries and keys its mask has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dtron.layers.attention_mask import AttentionMask


def attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> tuple[Tensor, Tensor]:
    """Return fake tensors in the place of ``(out [B, N, S, H], lse [B, N, S])``."""
    out, lse = _forward(q, k, v, pairs(mask, q.shape[2], k.shape[2]))
    return out, lse


def pairs(mask: AttentionMask, queries: int, keys: int) -> int:
    """Return the number of pairs of a query and a key that it sees, in one head of one row. Over
    cp, queries are spread evenly over the sequence. Documents are not known: a plan counts the
    pairs of whole rows."""
    s, window = mask.seq_len, mask.window if mask.windowed else None
    whole = s * (s + 1) // 2 if window is None else window * s - window * (window - 1) // 2
    if window is not None and mask.chunked:
        count, rest = divmod(s, window)
        whole = (count * window * (window + 1) + rest * (rest + 1)) // 2
    return whole * queries * keys // (s * s)


@torch.library.custom_op("dtron::planned_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("a plan runs on fake tensors")


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("dtron::planned_attention_backward", mutates_args=())
def _backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: int
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("a plan runs on fake tensors")


@_backward.register_fake
def _(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.pairs = inputs
    ctx.save_for_backward(q, k, v, *output)


def _gradients(ctx: Any, g: Tensor, g_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    return *_backward(g, q, k, v, out, lse, ctx.pairs), None


_forward.register_autograd(_gradients, setup_context=_save)
