"""Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).

Tensor parallelism shards the heads. Each rank projects, rotates and attends with its own heads, and
only ``w_o`` needs the other heads (Shoeybi et al. 2019, arXiv:1909.08053, figure 3b). The core is a
local region (attention_core.py): each rank unflattens the tokens of its own heads to
``[B, S, N, H]``. attention_kernels.py selects the kernels. If cp shards the sequences,
context_parallel.py does the communication; otherwise the core communicates nothing.
attention_mixer.py has the mixers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dtron.layers.attention_core import LARGEST, AttentionInputs, Heads, core, largest
from dtron.layers.kv_cache import Past, past_axes
from dtron.layers.linear import linear, linear_in
from dtron.layers.norm import HeadsNorm, Norm, norm, norm_over_heads, rms_normalized
from dtron.layers.rope import rotate
from dtron.mesh import Layout
from dtron.params import part, residual_out, weight, zeros


@dataclass(frozen=True)
class Attention:
    """The weights. ``sinks`` are learned scores, see attention_kernels.py. ``w_gate`` makes a gate
    for each channel of the outputs (Qiu et al. 2025, arXiv:2505.06708)."""

    segment: ClassVar[str] = "attention"

    w_q: Tensor = weight("embed", "heads", "head_dim", summed=1)
    w_gate: Tensor | None = weight("embed", "heads", "head_dim", summed=1, when="attention_gate")
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
    q_heads_norm: HeadsNorm | None = part(when="qk_heads_norm")
    k_heads_norm: HeadsNorm | None = part(when="qk_heads_norm", heads="kv_heads")


def attention(p: Attention, x_TD: Tensor, inputs: AttentionInputs, layout: Layout) -> Tensor:
    """Apply the layer: ``x_TD [T@tokens_sp, D]`` -> the same shape and placement."""
    return attention_outputs(p, x_TD, inputs, layout, logits=False)[0]


def attention_outputs(
    p: Attention, x_TD: Tensor, inputs: AttentionInputs, layout: Layout, logits: bool
) -> tuple[Tensor, ...]:
    """Return the result of ``attention``, and with ``logits`` also the largest logit of each head:
    ``[N@heads]``, a pending maximum over tokens."""
    recipe = inputs.recipe
    x_TD = layout.constrain(x_TD, "tokens", "act_embed")  # all-gather over tp
    q_TNH = linear(x_TD, p.w_q, p.b_q, recipe)  # local, like the next lines
    k_TKH = linear(x_TD, p.w_k, p.b_k, recipe)
    v_TKH = linear(x_TD, p.w_v, p.b_v, recipe)
    if p.q_norm is not None and p.k_norm is not None:
        q_TNH = norm(p.q_norm, q_TNH, inputs.eps)
        k_TKH = norm(p.k_norm, k_TKH, inputs.eps)
    if p.q_heads_norm is not None and p.k_heads_norm is not None:
        q_TNH = norm_over_heads(p.q_heads_norm, q_TNH, inputs.eps, layout)
        k_TKH = norm_over_heads(p.k_heads_norm, k_TKH, inputs.eps, layout)
    if inputs.query_factor_T is not None:
        q_TNH = (q_TNH * inputs.query_factor_T[:, None, None]).to(q_TNH.dtype)
    q, kv = ("tokens", "heads", None), ("tokens", "kv_heads", None)
    ins = (q, kv, kv, ("tokens", None), ("rows",), ("heads",), *past_axes("kv_heads"))

    def on_rank(
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        table_TH: Tensor | None,
        documents_T: Tensor | None,
        sinks_N: Tensor | None,
        *past: Tensor | None,
    ) -> tuple[Tensor, ...]:
        if table_TH is not None:
            q_TNH, k_TKH = rotate(q_TNH, table_TH), rotate(k_TKH, table_TH)
            if inputs.norm_rotated:
                q_TNH, k_TKH = (rms_normalized(x, inputs.eps) for x in (q_TNH, k_TKH))
        heads = Heads(q_TNH, k_TKH, v_TKH)
        o_TNH = core(heads, documents_T, sinks_N, Past(*past), inputs, layout)
        return (o_TNH, largest(heads, documents_T, inputs, layout)) if logits else (o_TNH,)

    # Communication over cp: see context_parallel.py.
    o_TNH, *largest_N = layout.local_map(on_rank, ins, [q, LARGEST] if logits else [q])(
        q_TNH, k_TKH, v_TKH, inputs.table_TH, inputs.documents_T, p.sinks, *inputs.past
    )
    if p.w_gate is not None:
        o_TNH = o_TNH * linear(x_TD, p.w_gate, recipe=recipe).sigmoid()
    y_TD = linear_in(o_TNH, p.w_o, recipe)  # {+tp}: a sum still pending
    y_TD = layout.constrain(y_TD, "tokens_sp", "act_embed")  # reduce-scatter over tp
    return y_TD if p.b_o is None else y_TD + p.b_o, *largest_N
