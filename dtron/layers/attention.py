"""Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).

Tensor parallelism cuts the heads: each rank projects, rotates and attends with its own heads, and only
``w_o`` needs the others (Shoeybi et al. 2019, arXiv:1909.08053, figure 3b). The core is a local region: each
rank holds whole sequences of its own heads, unfolds tokens to ``[B, S, N, H]`` and never communicates. Which
kernels it runs on is the business of cores.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from dtron.fp8 import Recipe
from dtron.layers.cores import CORES, AttentionPath, Mask, choose, with_blocks
from dtron.layers.linear import linear, linear_in
from dtron.layers.norm import Norm, norm
from dtron.layers.rope import rotate
from dtron.mesh import Layout
from dtron.params import part, residual_out, weight, zeros


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
    sinks: Tensor | None = weight("heads", init=zeros, when="sinks")
    q_norm: Norm | None = part(when="qk_norm", act_embed="head_dim")
    k_norm: Norm | None = part(when="qk_norm", act_embed="head_dim")


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
) -> Tensor:
    """``x_TD [T@tokens_sp, D]`` -> the same. ``table_TH`` holds the rotary angles (None: no rotation) and
    ``documents_T`` the document of each token (None: one per sequence), both ``[T@tokens]``. ``path``: the
    kernels, see cores.py; ``recipe``: products in FP8, or None."""
    x_TD = layout.constrain(x_TD, "tokens", "act_embed")  # all-gather over tp
    q_TNH = linear(x_TD, p.w_q, p.b_q, recipe)  # local, and so are the next lines
    k_TKH = linear(x_TD, p.w_k, p.b_k, recipe)
    v_TKH = linear(x_TD, p.w_v, p.b_v, recipe)
    if p.q_norm is not None:
        q_TNH, k_TKH = norm(p.q_norm, q_TNH, eps), norm(p.k_norm, k_TKH, eps)
    q, kv = ("tokens", "heads", None), ("tokens", "kv_heads", None)
    ins = (q, kv, kv, ("tokens", None), ("tokens",), ("heads",))
    region = layout.local(partial(core, path=path, mask=mask), ins, q)
    o_TNH = region(q_TNH, k_TKH, v_TKH, table_TH, documents_T, p.sinks)
    y_TD = linear_in(o_TNH, p.w_o, recipe)  # {+tp}: a sum still pending
    y_TD = layout.constrain(y_TD, "tokens_sp", "act_embed")  # reduce-scatter over tp
    return y_TD if p.b_o is None else y_TD + p.b_o


def prepare(
    mask: Mask,
    documents_T: Tensor | None,
    sinks: bool,
    head_dim: int,
    x_TD: Tensor,
    layout: Layout,
    path: AttentionPath = "auto",
) -> tuple[Mask, AttentionPath]:
    """What all layers of a stage share, made once: the path that ``auto`` stands for, and for flex the blocks
    of its mask (of this rank's documents: nothing is communicated)."""
    path = choose(path, mask, documents_T is not None, sinks, head_dim, x_TD.dtype, x_TD.device)
    if path != "flex":
        return mask, path
    documents = None
    if documents_T is not None:
        documents = layout.to_local(documents_T, "tokens").unflatten(0, (-1, mask.sequence))
    return with_blocks(mask, documents, x_TD.device), path


def core(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    table_TH: Tensor | None,
    documents_T: Tensor | None,
    sinks_N: Tensor | None,
    path: AttentionPath,
    mask: Mask,
) -> Tensor:
    """Rank-local: whole sequences of a rank's heads. Values may have another width than queries and keys, and
    the output has theirs."""
    if table_TH is not None:
        q_TNH, k_TKH = rotate(q_TNH, table_TH), rotate(k_TKH, table_TH)
    q, k, v = (t.unflatten(0, (-1, mask.sequence)).transpose(1, 2) for t in (q_TNH, k_TKH, v_TKH))
    documents = None if documents_T is None else documents_T.unflatten(0, (-1, mask.sequence))
    narrowest = min(q.shape[-1], v.shape[-1])
    path = choose(path, mask, documents is not None, sinks_N is not None, narrowest, q.dtype, q.device)
    return CORES[path](q, k, v, documents, sinks_N, mask).transpose(1, 2).flatten(0, 1)
