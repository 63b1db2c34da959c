"""Attention to some of a row's keys, forward and backward as two functions.

Ring attention sees a row's keys a block at a time, and its backward needs of each block the
gradients under the softmax over *all* of them. Fused kernels give these as they are: a backward
kernel takes the output and the log-sum-exp (lse) of its softmax, computes the weights as
``exp(score - lse)`` and never asks whether that lse came from the keys at hand. torch's public
function has neither the lse nor a backward by itself, so the operators beneath it are called; they
are private, and used here alone.

Keys that heads of queries share (GQA) are repeated for these kernels, which want one for each head,
and their gradients added after.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtron.layers.attention_kernels import products, repeated

Kernel = tuple[
    Tensor, Tensor
]  # what a fused backward wants back from its forward, without dropout for naught
_aten = torch.ops.aten


def block_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None
) -> tuple[Tensor, Tensor, Kernel | None]:
    """``(out [B, N, S, H], lse [B, N, S], what block_backward wants)`` for ``q [B, N, S, H]`` and k, v
    ``[B, K, S, H]``: ``causal``, or each query sees every key. ``scale``: of scores (None: 1 / sqrt(H))."""
    k, v = repeated(k, q), repeated(v, q)
    match kernel(q, v):
        case "cudnn":
            o, lse, _, _, _, _, *rest, _ = _aten._scaled_dot_product_cudnn_attention(
                q, k, v, None, True, 0.0, causal, scale=scale
            )
            return o, lse.flatten(2), tuple(rest)
        case "flash":
            o, lse, _, _, _, _, *rest, _ = _aten._scaled_dot_product_flash_attention(
                q, k, v, 0.0, causal, scale=scale
            )
            return o, lse, tuple(rest)
    scores = _scores(q, k, causal, scale)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse, None


def block_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    rest: Kernel | None,
    causal: bool,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of the output, where ``o`` and ``lse`` are those of the
    whole softmax, of which these keys are a part."""
    shared = k.shape[1]
    k, v = repeated(k, q), repeated(v, q)
    sizes = (q.shape[2], k.shape[2], 0.0, causal)  # the longest row of each, and no dropout
    match kernel(q, v):
        case "cudnn":
            dq, dk, dv = _aten._scaled_dot_product_cudnn_attention_backward(
                g, q, k, v, o, lse[..., None], *rest, None, None, None, *sizes, scale=scale
            )
        case "flash":
            dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
                g, q, k, v, o, lse, None, None, *sizes, *rest, scale=scale
            )
        case _:
            share = (_scores(q, k, causal, scale) - lse[..., None]).exp()
            delta = (g * o).sum(-1, keepdim=True)
            ds = (
                share * (g @ v.mT - delta) * (q.shape[-1] ** -0.5 if scale is None else scale)
            ).to(q.dtype)
            dq, dk, dv = ds @ k, ds.mT @ q, share.to(g.dtype).mT @ g
    return dq, *(x.unflatten(1, (shared, -1)).sum(2) for x in (dk, dv))


def kernel(q: Tensor, v: Tensor) -> str:
    """Which one ``block_forward`` and ``block_backward`` take for these; see ``kernel_for``."""
    return kernel_for(q.device, q.dtype, q.shape[-1], v.shape[-1])


def kernel_for(device: torch.device, dtype: torch.dtype, narrow: int, wide: int) -> str:
    """cuDNN's is about twice as fast as flash on Hopper, where it is there. Both are for 16 bits,
    and heads of queries as wide as those of values; what neither takes is written out, with all
    scores in memory."""
    if device.type != "cuda" or dtype.itemsize != 2 or narrow != wide or narrow % 8 or narrow > 256:
        return "written"
    return "cudnn" if narrow <= 128 and _has_cudnn() else "flash"


@torch.compiler.assume_constant_result  # not with functools.cache: dynamo would look through both
def _has_cudnn() -> bool:
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float | None) -> Tensor:
    scores = products(q, k, scale)
    if not causal:
        return scores
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, float("-inf"))
