"""Latent attention in generation: attention in the space of latents (DeepSeek-V2, arXiv:2405.04434,
section 2.1.2 and appendix C).

The cache has the latent c and the rotary key of each token, and neither keys nor values of heads.
The up-projections are absorbed. A score of head n is

    q . (c W_k)  =  (q W_k^T) . c

so the query is projected instead of all keys. The sum of values is (sum of a_j c_j) W_v, so one
vector is projected instead of all values. What is left is attention in which all heads share one
key, [c, rotary key], whose first part is also the value.

A page has kv_rank + rope_dim numbers per token: 576 in DeepSeek-V3, instead of 40,960 with whole
heads. Every tp rank has all of them, and its own heads' queries.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dtron.layers.attention_core import AttentionInputs, Heads, core
from dtron.layers.attention_mask import AttentionMask
from dtron.layers.kv_cache import KVCache, Past, past_axes
from dtron.layers.linear import linear
from dtron.layers.quantized_weight import dense
from dtron.layers.rope import rotate
from dtron.mesh import Layout


def empty_latent_cache(
    pages: int, page: int, width: int, layout: Layout, dtype: torch.dtype, device: str
) -> KVCache:
    """Make an empty cache of latents; see ``empty_kv_cache``.

    ``width``: of a latent and a rotary key."""
    shape = pages // layout.parts("tokens"), page, 1, width
    latents = torch.zeros(shape, dtype=dtype, device=device)
    return KVCache(layout.from_local(latents, "tokens", None, None, None), None)


def attend_to_latents(
    q_TNH: Tensor,
    c_TR: Tensor,
    k_TH: Tensor,
    w_kv_up: Any,
    inputs: AttentionInputs,
    layout: Layout,
    selected_TS: Tensor | None = None,
) -> Tensor:
    """Return the heads' outputs, ``[T@tokens, N@heads, V]``.

    ``q_TNH``: the queries, ``[T@tokens, N@heads, qk_dim]``.
    ``c_TR``, ``k_TH``: the latents and the rotary keys of the new tokens, before the rotation.
    ``selected_TS [T@tokens, S]``: the keys of its row's pages that a token sees (None: all earlier
        tokens)."""
    heads, shared = ("tokens", "heads", None), ("tokens", None)
    ins = (heads, shared, shared, shared, (None, "heads", None), shared, *past_axes(None))
    mask = inputs.mask
    assert isinstance(mask, AttentionMask)  # rows are whole
    if mask.scale is None:  # by the width of a head, which the absorbed query does not have
        mask = replace(mask, scale=q_TNH.shape[-1] ** -0.5)
    inputs = replace(inputs, mask=mask)

    def on_rank(
        q_TNH: Tensor,
        c_TR: Tensor,
        k_TH: Tensor,
        table_TH: Tensor | None,
        w_RNH: Tensor,
        selected_TS: Tensor | None,
        *past: Tensor | None,
    ) -> Tensor:
        rank, nope = c_TR.shape[-1], q_TNH.shape[-1] - k_TH.shape[-1]
        plain_q, rotary_q = q_TNH.split([nope, k_TH.shape[-1]], dim=-1)
        if table_TH is not None:
            rotary_q, k_TH = rotate(rotary_q, table_TH), rotate(k_TH[:, None], table_TH)[:, 0]
        absorbed_q = torch.einsum("tnh,rnh->tnr", plain_q, w_RNH[..., :nope])
        k_T1H = torch.cat([c_TR, k_TH], dim=-1)[:, None]
        own = Heads(torch.cat([absorbed_q, rotary_q], dim=-1), k_T1H, k_T1H[..., :rank])
        some = inputs
        if selected_TS is not None:
            selected = selected_TS.unflatten(0, (-1, mask.seq_len))
            some = replace(inputs, mask=replace(mask, selected=selected))
        o_TNR = core(own, None, None, Past(*past), some, layout)
        return torch.einsum("tnr,rnh->tnh", o_TNR, w_RNH[..., nope:])

    w_RNH = _whole(w_kv_up, c_TR, layout)
    region = layout.local_map(on_rank, ins, heads)
    return region(q_TNH, c_TR, k_TH, inputs.table_TH, w_RNH, selected_TS, *inputs.past)


def _whole(w: Any, c_TR: Tensor, layout: Layout) -> Tensor:
    """Return the up-projection as a tensor, with a low-rank update if it has one."""
    w = dense(w)
    if isinstance(w, Tensor):
        return w
    one = torch.eye(c_TR.shape[-1], dtype=c_TR.dtype, device=c_TR.device)
    return linear(layout.shard(one, None, None), w)
