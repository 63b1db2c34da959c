"""Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245), and the core that every variant shares.

Tensor parallelism cuts the heads: each rank projects, rotates and attends with its own heads, and only
``w_o`` needs the others (Shoeybi et al. 2019, arXiv:1909.08053, figure 3b). The core is a local region: each
rank holds whole sequences of its own heads, unfolds tokens to ``[B, S, N, H]`` and never communicates.

``attention_reference`` is the definition: scores, soft-cap, mask, softmax, written out. ``attention_fused``
is the same function through torch's fused kernels, which know no soft-cap. Both have one signature, and a
test holds them together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dtron.fp8 import Recipe
from dtron.layers.linear import linear, linear_in
from dtron.layers.norm import Norm, norm
from dtron.layers.rope import rotate
from dtron.mesh import Layout
from dtron.params import part, residual_out, weight, zeros

AttentionPath = Literal["auto", "reference", "sdpa", "flex"]


@dataclass(frozen=True)
class Attention:
    w_q: Tensor = weight("embed", "heads", "head_dim")
    w_k: Tensor = weight("embed", "kv_heads", "head_dim")
    w_v: Tensor = weight("embed", "kv_heads", "head_dim")
    w_o: Tensor = weight("heads", "head_dim", "embed", init=residual_out)
    b_q: Tensor | None = weight("heads", "head_dim", init=zeros, when="qkv_bias")
    b_k: Tensor | None = weight("kv_heads", "head_dim", init=zeros, when="qkv_bias")
    b_v: Tensor | None = weight("kv_heads", "head_dim", init=zeros, when="qkv_bias")
    b_o: Tensor | None = weight("act_embed", init=zeros, when="bias")
    q_norm: Norm | None = part(when="qk_norm", act_embed="head_dim")
    k_norm: Norm | None = part(when="qk_norm", act_embed="head_dim")


@dataclass(frozen=True)
class Mask:
    """Who attends to whom: a token sees earlier tokens (and itself) of its sequence, no further back than
    ``window`` tokens counting itself, and of its own document where documents are given. ``softcap`` bounds
    the scores to (-softcap, softcap) by tanh (Gemma 2, arXiv:2408.00118)."""

    sequence: int
    window: int | None = None
    softcap: float | None = None


def attention(
    p: Attention,
    x_TD: Tensor,
    table_TH: Tensor | None,
    documents_T: Tensor | None,
    mask: Mask,
    layout: Layout,
    eps: float = 1e-5,
    path: AttentionPath = "auto",
    recipe: Recipe | None = None,
    core: Callable | None = None,
) -> Tensor:
    """``x_TD [T@tokens_sp, D]`` -> the same. ``table_TH`` holds the rotary angles (None: no rotation) and
    ``documents_T`` the document of each token (None: one per sequence), both ``[T@tokens]``."""
    core = core or (attention_reference if mask.softcap else attention_fused)
    x_TD = layout.constrain(x_TD, "tokens", "act_embed")  # all-gather over tp
    q_TNH = linear(x_TD, p.w_q, p.b_q, recipe)  # local, and so are the next lines
    k_TKH = linear(x_TD, p.w_k, p.b_k, recipe)
    v_TKH = linear(x_TD, p.w_v, p.b_v, recipe)
    if p.q_norm is not None:
        q_TNH, k_TKH = norm(p.q_norm, q_TNH, eps), norm(p.k_norm, k_TKH, eps)
    q, kv = ("tokens", "heads", None), ("tokens", "kv_heads", None)
    region = layout.local(partial(_core, core=core, mask=mask), (q, kv, kv, ("tokens", None), ("tokens",)), q)
    o_TNH = region(q_TNH, k_TKH, v_TKH, table_TH, documents_T)
    y_TD = linear_in(o_TNH, p.w_o, recipe)  # {+tp}: a sum still pending
    y_TD = layout.constrain(y_TD, "tokens_sp", "act_embed")  # reduce-scatter over tp
    return y_TD if p.b_o is None else y_TD + p.b_o


def _core(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    table_TH: Tensor | None,
    documents_T: Tensor | None,
    core: Callable,
    mask: Mask,
) -> Tensor:
    if table_TH is not None:
        q_TNH, k_TKH = rotate(q_TNH, table_TH), rotate(k_TKH, table_TH)
    q, k, v = (t.unflatten(0, (-1, mask.sequence)).transpose(1, 2) for t in (q_TNH, k_TKH, v_TKH))
    documents = None if documents_T is None else documents_T.unflatten(0, (-1, mask.sequence))
    return core(q, k, v, documents, mask).transpose(1, 2).flatten(0, 1)


def allowed(mask: Mask, documents_BS: Tensor | None, device: torch.device) -> Tensor:
    """``[S, S]``, or ``[B, 1, S, S]`` with documents: True where query (row) may see key (column)."""
    i = torch.arange(mask.sequence, device=device)
    back = i[:, None] - i[None, :]
    ok = back >= 0
    if mask.window is not None:
        ok = ok & (back < mask.window)
    if documents_BS is not None:
        ok = ok & (documents_BS[:, None, :, None] == documents_BS[:, None, None, :])
    return ok


def attention_reference(q: Tensor, k: Tensor, v: Tensor, documents_BS: Tensor | None, mask: Mask) -> Tensor:
    """``q [B, N, S, H]``, ``k`` and ``v [B, K, S, H]`` -> ``[B, N, S, H]``; softmax in float32 at least."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(q.shape[-1])
    if mask.softcap is not None:
        scores = mask.softcap * torch.tanh(scores / mask.softcap)
    scores = scores.masked_fill(~allowed(mask, documents_BS, q.device), float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


def attention_fused(q: Tensor, k: Tensor, v: Tensor, documents_BS: Tensor | None, mask: Mask) -> Tensor:
    """``attention_reference`` through torch's fused kernels: no ``[S, S]`` matrix where the mask is plain
    causal. Raises ValueError for a soft-cap, which they do not know."""
    if mask.softcap is not None:
        raise ValueError(f"softcap={mask.softcap}: the fused kernels have none; use attention_reference")
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    causal = mask.window is None and documents_BS is None
    bias = None if causal else allowed(mask, documents_BS, q.device)
    with sdpa_kernel(_FASTEST, set_priority=True) if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)


# On an H200 (head_dim 128, sequence 4096, bf16) cuDNN has 545 TFLOP/s forward and 439 backward, flash 271 and
# 226.
_FASTEST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
