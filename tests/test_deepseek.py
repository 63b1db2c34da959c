"""DeepSeek-V2 and V3 as Hugging Face transformers computes them, from random weights mapped by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_transformers import random_rows
from torch import Tensor
from values import ONE

from dtron.config import ModelConfig
from dtron.layers.mla import Latent
from dtron.layers.rope import Rope
from dtron.model import Transformer, declare_model, make_batch, predict
from dtron.params import Weight, tree_map

hf = pytest.importorskip("transformers")

YARN = Rope(100.0, "yarn", 4.0, 32, beta_fast=2.0, mscale=0.7, mscale_all=0.9)
V3 = ModelConfig(
    vocab=61, embed=64, layers=2, heads=4, mlp=96, context=128, vocab_multiple=8, norm_eps=1e-6, rope=YARN,
    mla=Latent(kv_rank=20, q_rank=24, nope_dim=10, rope_dim=8, v_dim=12),
)  # fmt: skip
LITE = replace(V3, mla=replace(V3.mla, q_rank=0))


def transformers_model(kind: str, m: ModelConfig) -> torch.nn.Module:
    """Weights are so large that attention is far from uniform; norms are away from 1."""
    rope = {"rope_type": "default"}
    if m.rope.scaling == "yarn":
        rope = {
            "rope_type": "yarn", "factor": m.rope.factor, "beta_fast": m.rope.beta_fast,
            "beta_slow": m.rope.beta_slow, "original_max_position_embeddings": m.rope.original,
            "mscale": m.rope.mscale, "mscale_all_dim": m.rope.mscale_all,
        }  # fmt: skip
    config = getattr(hf, f"{kind}Config")(
        vocab_size=m.vocab, hidden_size=m.embed, num_hidden_layers=m.layers, num_attention_heads=m.heads,
        num_key_value_heads=m.heads,
        intermediate_size=m.mlp, max_position_embeddings=m.context, rms_norm_eps=m.norm_eps,
        q_lora_rank=m.mla.q_rank or None, kv_lora_rank=m.mla.kv_rank, qk_nope_head_dim=m.mla.nope_dim,
        qk_rope_head_dim=m.mla.rope_dim, v_head_dim=m.mla.v_dim, attn_implementation="eager",
        rope_parameters={"rope_theta": m.rope.theta, **rope}, first_k_dense_replace=m.layers,
    )  # fmt: skip
    model = getattr(hf, f"{kind}ForCausalLM")(config)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, w in model.named_parameters():
            center = 1.0 if w.ndim == 1 and name.endswith("weight") else 0.0
            w.copy_(center + torch.randn(w.shape, generator=g) * (0.2 if w.ndim > 1 else 0.3))
    return model.eval()


NAMES = {
    "embedding.w_tokens": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "w_head": "lm_head.weight",
    "norm_1.scale": "input_layernorm.weight",
    "norm_2.scale": "post_attention_layernorm.weight",
    "mla.w_q_down": "self_attn.q_a_proj.weight",
    "mla.q_norm.scale": "self_attn.q_a_layernorm.weight",
    "mla.w_q_up": "self_attn.q_b_proj.weight",
    "mla.w_q": "self_attn.q_proj.weight",
    "mla.w_kv_down": "self_attn.kv_a_proj_with_mqa.weight",
    "mla.kv_norm.scale": "self_attn.kv_a_layernorm.weight",
    "mla.w_kv_up": "self_attn.kv_b_proj.weight",
    "mla.w_o": "self_attn.o_proj.weight",
    **{f"mlp.w_{x}": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
}
ROTARY_LAST = ("w_q_up", "w_q", "w_kv_down")


def halves(w: Tensor, rotary: int) -> Tensor:
    """The last ``rotary`` columns from DeepSeek's order, pairs side by side, to ours, pairs half a width
    apart."""
    plain, turned = w.split([w.shape[-1] - rotary, rotary], dim=-1)
    return torch.cat([plain, turned[..., 0::2], turned[..., 1::2]], dim=-1)


def mapped(theirs: dict[str, Any], m: ModelConfig, permuted: bool = True) -> Transformer:
    used = set()

    def convert(w: Weight) -> Tensor:
        block, name = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)", w.path).groups()
        source = (f"model.layers.{block}." if block else "") + NAMES[name]
        used.add(source)
        x = theirs[source].detach()
        if w.axes[0] == "vocab":
            return F.pad(x, (0, 0, 0, w.shape[0] - len(x)), value=1.0)
        x = x.mT.reshape(w.shape) if x.ndim > 1 else x
        return halves(x, m.mla.rope_dim) if permuted and name.endswith(ROTARY_LAST) else x

    params = tree_map(convert, declare_model(m))
    assert used == set(theirs)
    return params


def differ(model: torch.nn.Module, m: ModelConfig, permuted: bool = True) -> float:
    """The largest difference of two logits, relative to the largest logit."""
    rows = random_rows(1)
    with torch.no_grad():
        want = model(input_ids=rows[:, :-1], use_cache=False).logits.flatten(0, 1)
        params = mapped(dict(model.named_parameters()), m, permuted)
        got = predict(params, make_batch(rows, ONE), m, ONE)
    assert got.dtype == want.dtype == torch.float32 and got.shape == want.shape
    return ((got - want).abs().max() / want.abs().max()).item()


CASES = {
    "v3": (V3, "DeepseekV3", {"rope": replace(YARN, mscale_all=0.7)}),
    "v3-unstretched": (replace(V3, rope=Rope(100.0)), "DeepseekV3", {"rope": Rope(90.0)}),
    "v2-lite": (LITE, "DeepseekV2", {"rope": replace(YARN, mscale=0.9)}),
}


@pytest.mark.parametrize("name", CASES)
def test_logits(name):
    """And the comparison sees a config that is a little wrong, and weights in another order."""
    m, kind, wrong = CASES[name]
    model = transformers_model(kind, m)
    assert differ(model, m) <= 1e-5
    assert differ(model, replace(m, **wrong)) > 1e-3
    assert differ(model, m, permuted=False) > 1e-3
