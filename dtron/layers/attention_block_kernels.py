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

from typing import NamedTuple

import torch
from torch import Tensor

from dtron.layers.attention_kernels import products, repeated
from dtron.torch_compile import kernel_device

# A fused forward passes two tensors to its backward, which ignores them without dropout.
DropoutState = tuple[Tensor, Tensor]
_aten = torch.ops.aten


class BlockResult(NamedTuple):
    """The result of attention to some of a row's keys.

    ``out [B, N, S, H]``: the output.
    ``lse [B, N, S]``: the logarithm of the softmax's denominator.
    ``dropout``: tensors from a fused forward for its backward; None from plain matmuls."""

    out: Tensor
    lse: Tensor
    dropout: DropoutState | None


def block_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None
) -> BlockResult:
    """Attend with ``q [B, N, S, H]`` to the keys and values ``k``, ``v [B, K, S, H]``.

    ``causal``: whether the mask is causal; otherwise each query sees every key.
    ``scale``: the factor on scores (None: 1 / sqrt(H))."""
    k, v = repeated(k, q), repeated(v, q)
    match kernel(q, v):
        case "cudnn":
            o, lse, _, _, _, _, *rest, _ = _aten._scaled_dot_product_cudnn_attention(
                q, k, v, None, True, 0.0, causal, scale=scale
            )
            return BlockResult(o, lse.flatten(2), tuple(rest))
        case "flash":
            o, lse, _, _, _, _, *rest, _ = _aten._scaled_dot_product_flash_attention(
                q, k, v, 0.0, causal, scale=scale
            )
            return BlockResult(o, lse, tuple(rest))
    scores = _scores(q, k, causal, scale)
    lse = scores.logsumexp(-1)
    return BlockResult((scores - lse[..., None]).exp().to(v.dtype) @ v, lse, None)


def block_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    result: BlockResult,
    causal: bool,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v.

    ``g``: the gradient of the output.
    ``k``, ``v``: some of the keys and values of the softmax.
    ``result``: the output and the lse of the whole softmax.
    ``causal``, ``scale``: see ``block_forward``."""
    (o, lse, dropout), kv_heads = result, k.shape[1]
    k, v = repeated(k, q), repeated(v, q)
    sizes = (q.shape[2], k.shape[2], 0.0, causal)  # the longest row of q and of k, no dropout
    match kernel(q, v):
        case "cudnn":
            assert dropout is not None
            dq, dk, dv = _aten._scaled_dot_product_cudnn_attention_backward(
                g, q, k, v, o, lse[..., None], *dropout, None, None, None, *sizes, scale=scale
            )
        case "flash":
            assert dropout is not None
            dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
                g, q, k, v, o, lse, None, None, *sizes, *dropout, scale=scale
            )
        case _:
            share = (_scores(q, k, causal, scale) - lse[..., None]).exp()
            delta = (g * o).sum(-1, keepdim=True)
            factor = q.shape[-1] ** -0.5 if scale is None else scale
            ds = (share * (g @ v.mT - delta) * factor).to(q.dtype)
            dq, dk, dv = ds @ k, ds.mT @ q, share.to(g.dtype).mT @ g
    return dq, *(x.unflatten(1, (kv_heads, -1)).sum(2) for x in (dk, dv))


def kernel(q: Tensor, v: Tensor) -> str:
    """Name the kernel that ``block_forward`` and ``block_backward`` use; see ``kernel_for``."""
    return kernel_for(q.device, q.dtype, q.shape[-1], v.shape[-1])


def kernel_for(device: torch.device, dtype: torch.dtype, qk_dim: int, v_dim: int) -> str:
    """Select the kernel. cuDNN's kernel is available on Hopper, where it is about twice as fast as
    flash. Both kernels need 16-bit dtypes, and query heads as wide as value heads. Otherwise
    attention runs as plain matmuls ("written"), with all scores in memory.

    ``qk_dim``: the width of a head of queries and keys.
    ``v_dim``: the width of a head of values."""
    if kernel_device(device) != "cuda" or dtype.itemsize != 2 or qk_dim != v_dim:
        return "written"
    if qk_dim % 8 or qk_dim > 256:
        return "written"
    return "cudnn" if qk_dim <= 128 and _has_cudnn(device) else "flash"


def _has_cudnn(device: torch.device) -> bool:
    if device.type != "cuda":  # a plan, for a Hopper GPU or a newer one
        return True
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float | None) -> Tensor:
    scores = products(q, k, scale)
    if not causal:
        return scores
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, float("-inf"))
