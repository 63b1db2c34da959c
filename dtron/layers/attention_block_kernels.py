"""Attention to some of a row's keys, with forward and backward as two functions.

Ring attention sees a row's keys one block at a time. Its backward needs, for each block, the
gradients under the softmax over *all* blocks. Fused kernels give these gradients unchanged: a
backward kernel takes the output and the log-sum-exp (lse) of its softmax, computes the weights as
``exp(score - lse)`` and never checks whether this lse came from the given keys. torch's public
function returns no lse and has no separate backward. So this file calls the operators below it.
They are private, and only this file uses them.

Under GQA several query heads share a key head. These kernels need one key head per query head. So
keys and values are repeated, and their gradients are summed afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtron.layers.attention_kernels import products, repeated

Kernel = tuple[
    Tensor, Tensor
]  # passed from a fused forward to its backward, which ignores it without dropout
_aten = torch.ops.aten


def block_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None
) -> tuple[Tensor, Tensor, Kernel | None]:
    """Return ``(out [B, N, S, H], lse [B, N, S], rest for block_backward)`` for ``q [B, N, S, H]``
    and k, v ``[B, K, S, H]``.

    ``causal``: whether the mask is causal; otherwise each query sees every key.
    ``scale``: the factor on scores (None: 1 / sqrt(H))."""
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
    """Return the gradients of q, k and v from the output's gradient ``g``. ``o`` and ``lse`` belong
    to the whole softmax; the given keys are only some of its keys."""
    shared = k.shape[1]
    k, v = repeated(k, q), repeated(v, q)
    sizes = (q.shape[2], k.shape[2], 0.0, causal)  # the longest row of q and of k, no dropout
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
    """Return the kernel that ``block_forward`` and ``block_backward`` use; see ``kernel_for``."""
    return kernel_for(q.device, q.dtype, q.shape[-1], v.shape[-1])


def kernel_for(device: torch.device, dtype: torch.dtype, narrow: int, wide: int) -> str:
    """Select the kernel. Where cuDNN's is available, on Hopper, it is about twice as fast as flash.
    Both need 16-bit dtypes, and query heads (``narrow``) as wide as value heads (``wide``).
    Otherwise attention runs as plain matmuls ("written"), with all scores in memory."""
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
