"""Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).

Tensor parallelism shards the heads. Each rank projects, rotates and attends with its own heads, and
only ``w_o`` needs the other heads (Shoeybi et al. 2019, arXiv:1909.08053, figure 3b). The core is a
local region: each rank unflattens the tokens of its own heads to ``[B, S, N, H]``.
attention_kernels.py selects the kernels. If cp shards the sequences, context_parallel.py does the
communication; otherwise the core communicates nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from dtron.fp8.recipe import Recipe
from dtron.layers.attention_kernels import CORES, AttentionMask, AttentionPath
from dtron.layers.context_parallel import ContextParallelMask, attend
from dtron.layers.kv_cache import KVCache, recall
from dtron.layers.linear import linear, linear_in
from dtron.layers.norm import Norm, norm
from dtron.layers.rope import rotate
from dtron.mesh import Layout
from dtron.params import part, residual_out, weight, zeros


@dataclass(frozen=True)
class Attention:
    w_q: Tensor = weight("embed", "heads", "head_dim", summed=1)
    w_k: Tensor = weight("embed", "kv_heads", "head_dim", summed=1)
    w_v: Tensor = weight("embed", "kv_heads", "head_dim", summed=1)
    w_o: Tensor = weight("heads", "head_dim", "embed", summed=2, init=residual_out)
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
    mask: AttentionMask | ContextParallelMask,
    layout: Layout,
    eps: float = 1e-5,
    path: AttentionPath = "auto",
    recipe: Recipe | None = None,
    past: KVCache | None = None,
) -> Tensor:
    """Apply the layer: ``x_TD [T@tokens_sp, D]`` -> the same shape and placement.

    ``table_TH``: the rotary angles of each token, ``[T@tokens]`` (None: no rotation).
    ``documents_T [T@rows]``: the document of each token, in the row's own order (None: one document
    per sequence).
    ``mask``: a ``ContextParallelMask`` if cp shards the rows, see context_parallel.py.
    ``path``: the kernels, see attention_kernels.py.
    ``recipe``: the recipe for FP8 matmuls, or None.
    ``past``: keys and values of earlier tokens, see kv_cache.py. The new ones are added to it."""
    x_TD = layout.constrain(x_TD, "tokens", "act_embed")  # all-gather over tp
    q_TNH = linear(x_TD, p.w_q, p.b_q, recipe)  # local, like the next lines
    k_TKH = linear(x_TD, p.w_k, p.b_k, recipe)
    v_TKH = linear(x_TD, p.w_v, p.b_v, recipe)
    if p.q_norm is not None:
        q_TNH, k_TKH = norm(p.q_norm, q_TNH, eps), norm(p.k_norm, k_TKH, eps)
    q, kv = ("tokens", "heads", None), ("tokens", "kv_heads", None)
    ins = (q, kv, kv, ("tokens", None), ("rows",), ("heads",), kv, kv, ("tokens",))
    region = layout.local(partial(core, path=path, mask=mask, layout=layout), ins, q)
    # Communication over cp: see context_parallel.py.
    o_TNH = region(q_TNH, k_TKH, v_TKH, table_TH, documents_T, p.sinks, *parts(past))
    y_TD = linear_in(o_TNH, p.w_o, recipe)  # {+tp}: a sum still pending
    y_TD = layout.constrain(y_TD, "tokens_sp", "act_embed")  # reduce-scatter over tp
    return y_TD if p.b_o is None else y_TD + p.b_o


def parts(past: KVCache | None) -> tuple[Tensor | None, ...]:
    """Return a cache's three tensors, as arguments of a local region."""
    return (None, None, None) if past is None else (past.k_TKH, past.v_TKH, past.places_T)


def core(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    table_TH: Tensor | None,
    documents_T: Tensor | None,
    sinks_N: Tensor | None,
    past_k: Tensor | None,
    past_v: Tensor | None,
    places_T: Tensor | None,
    path: AttentionPath,
    mask: AttentionMask | ContextParallelMask,
    layout: Layout,
) -> Tensor:
    """Attend with a rank's own heads and its own tokens. Rank-local. Values may have another width
    than queries and keys; the output is as wide as the values. With a past, rows are whole,
    ``path`` is a core that takes the mask as an explicit matrix, and there are no documents."""
    if table_TH is not None:
        q_TNH, k_TKH = rotate(q_TNH, table_TH), rotate(k_TKH, table_TH)
    if past_k is None:
        return attend(q_TNH, k_TKH, v_TKH, documents_T, sinks_N, mask, layout, path)
    q = q_TNH.unflatten(0, (-1, mask.seq_len)).transpose(1, 2)
    k, v, mask = recall(k_TKH, v_TKH, past_k, past_v, places_T, mask)
    return CORES[path](q, k, v, None, sinks_N, mask).transpose(1, 2).flatten(0, 1)
