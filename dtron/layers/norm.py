"""Normalisation over the embedding: RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) and LayerNorm
(Ba et al. 2016, arXiv:1607.06450).

Both work on each token alone. So under sequence parallelism they run on a rank's own tokens and
need no communication. Their weights are whole on every rank, and each rank sees only some of the
tokens. So the weight's gradient is a sum still pending over dp, cp *and* tp. DTensor keeps track of
this sum. A trainer that forgets the sum over tp is wrong in exactly the norm weights. This bug has
shipped.

Some models normalise the queries of all heads of a token together (OLMo 2, arXiv:2501.00656,
section 3.2; MiniMax-M2). Heads are sharded over tp, and their weight with them. So
``norm_over_heads`` communicates: one all-reduce of a number per token. Mamba-2 normalises groups of
heads (``norm_in_groups``); over tp each rank has whole groups, or all ranks share the one group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dtron.mesh import Layout
from dtron.params import ones, weight, zeros


@dataclass(frozen=True)
class Norm:
    """The weights. RMSNorm has no ``bias``; LayerNorm has one."""

    scale: Tensor = weight("act_embed", init=ones)
    bias: Tensor | None = weight("act_embed", init=zeros, when="layernorm")


def norm(p: Norm, x: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalise the last dim. Statistics are in float32 at least; the result has the shape and
    dtype of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if p.bias is not None:
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = wide.to(x.dtype) * p.scale
    return y if p.bias is None else y + p.bias


def rms_normalized(x: Tensor, eps: float) -> Tensor:
    """Apply RMSNorm without a weight to the last dim, as ``norm`` does."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def norm_if(p: Norm | None, x: Tensor, eps: float) -> Tensor:
    """Normalise, where the model has this norm."""
    return x if p is None else norm(p, x, eps)


@dataclass(frozen=True)
class HeadsNorm:
    """The weight of an RMSNorm over all heads of a token. The axis ``heads`` may be renamed."""

    scale: Tensor = weight("heads", "head_dim", init=ones)


def norm_over_heads(p: HeadsNorm, x_TNH: Tensor, eps: float, layout: Layout) -> Tensor:
    """Normalise the last two dims of ``x_TNH [T@tokens, N@heads, H]`` together. Statistics are in
    float32 at least; the result has the shape, placement and dtype of ``x_TNH``."""
    wide = x_TNH.to(torch.promote_types(x_TNH.dtype, torch.float32))
    sum_T = layout.constrain(wide.square().sum((-2, -1)), "tokens")  # all-reduce over tp
    size = x_TNH.shape[-2] * x_TNH.shape[-1]
    return (wide * torch.rsqrt(sum_T / size + eps)[:, None, None]).to(x_TNH.dtype) * p.scale


def norm_in_groups(
    p: HeadsNorm, x_TNH: Tensor, groups: int, axis: str, eps: float, layout: Layout
) -> Tensor:
    """Normalise each group of heads of ``x_TNH [T@tokens, N@value_heads, H]`` together. The result
    has the shape, placement and dtype of ``x_TNH``.

    ``axis``: the logical axis of groups: ``key_heads``, or ``act_key_heads`` if the heads of one
        group are sharded."""
    heads, own = ("tokens", "value_heads", None), ("tokens", axis)
    per_group, width = x_TNH.shape[1] // groups, x_TNH.shape[1] * x_TNH.shape[2] // groups
    summed = ("tokens", "+value_heads") if axis.startswith("act_") else own

    def squares(x_TNH: Tensor) -> Tensor:
        in_group = min(per_group, x_TNH.shape[1])
        return x_TNH.square().sum(-1).unflatten(1, (-1, in_group)).sum(-1)

    def scaled(x_TNH: Tensor, sum_TG: Tensor, scale_NH: Tensor) -> Tensor:
        factor_TG = torch.rsqrt(sum_TG / width + eps)
        factor_TN = factor_TG.repeat_interleave(x_TNH.shape[1] // sum_TG.shape[1], dim=1)
        return (x_TNH * factor_TN[..., None]).to(dtype) * scale_NH

    dtype = x_TNH.dtype
    x_TNH = x_TNH.to(torch.promote_types(dtype, torch.float32))
    sum_TG = layout.local_map(squares, [heads], summed)(x_TNH)
    sum_TG = layout.constrain(sum_TG, *own)  # with one group: all-reduce over tp
    return layout.local_map(scaled, [heads, own, heads[1:]], heads)(x_TNH, sum_TG, p.scale)
