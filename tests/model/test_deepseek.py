"""DeepSeek-V2 and V3 against Hugging Face transformers, from random weights mapped by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dtron.layers.cross_entropy import IGNORE
from dtron.layers.mla import MLAConfig
from dtron.layers.rope import RopeConfig
from dtron.model.batch import make_batch
from dtron.model.mtp import MTPConfig
from dtron.model.transformer import Transformer, declare_model, embed, predict, stage
from dtron.moe.config import MoEConfig
from dtron.params import WeightSpec
from dtron.runtime.config import ModelConfig
from dtron.tree import tree_map
from tests.helpers.hf_models import draw_weights
from tests.helpers.values import ONE, halves
from tests.model.test_transformers import random_rows

hf = pytest.importorskip("transformers")

YARN = RopeConfig(100.0, "yarn", 4.0, 32, beta_fast=2.0, mscale=0.7, mscale_all=0.9)
V3 = ModelConfig(
    vocab=61,
    embed=64,
    layers=2,
    heads=4,
    mlp=96,
    context=128,
    vocab_multiple=8,
    norm_eps=1e-6,
    rope=YARN,
    mla=MLAConfig(kv_rank=20, q_rank=24, nope_dim=10, rope_dim=8, v_dim=12),
)
LITE = replace(V3, mla=replace(V3.mla, q_rank=0))
EXPERTS = MoEConfig(
    8,
    3,
    24,
    dense_layers=1,
    score="sigmoid",
    scale=2.5,
    groups=4,
    group_top_k=2,
    shared=24,
    bias_rate=0.001,
)
LITE_EXPERTS = MoEConfig(8, 3, 24, dense_layers=1, normalize=False, shared=48)


def transformers_model(kind: str, m: ModelConfig) -> torch.nn.Module:
    rope = {"rope_type": "default"}
    if m.rope.scaling == "yarn":
        rope = {
            "rope_type": "yarn",
            "factor": m.rope.factor,
            "beta_fast": m.rope.beta_fast,
            "beta_slow": m.rope.beta_slow,
            "original_max_position_embeddings": m.rope.original,
            "mscale": m.rope.mscale,
            "mscale_all_dim": m.rope.mscale_all,
        }
    c, experts = m.moe, {"first_k_dense_replace": m.layers}
    if c.experts:
        experts = {
            "first_k_dense_replace": c.dense_layers,
            "n_routed_experts": c.experts,
            "n_group": c.groups,
            "num_experts_per_tok": c.top_k,
            "moe_intermediate_size": c.mlp,
            "topk_group": c.group_top_k,
            "n_shared_experts": c.shared // c.mlp,
            "routed_scaling_factor": c.scale,
            "norm_topk_prob": c.normalize,
        }
    config = getattr(hf, f"{kind}Config")(
        vocab_size=m.vocab,
        hidden_size=m.embed,
        num_hidden_layers=m.layers,
        num_attention_heads=m.heads,
        num_key_value_heads=m.heads,
        intermediate_size=m.mlp,
        max_position_embeddings=m.context,
        rms_norm_eps=m.norm_eps,
        q_lora_rank=m.mla.q_rank or None,
        kv_lora_rank=m.mla.kv_rank,
        qk_nope_head_dim=m.mla.nope_dim,
        qk_rope_head_dim=m.mla.rope_dim,
        v_head_dim=m.mla.v_dim,
        attn_implementation="eager",
        rope_parameters={"rope_theta": m.rope.theta, **rope},
        **experts,
    )
    model = getattr(hf, f"{kind}ForCausalLM")(config)
    return random_weights(model)


def random_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Draw large weights, so that attention is far from uniform. Norms are away from 1."""
    g = draw_weights(model.named_parameters())
    with torch.no_grad():
        for name, w in model.named_buffers():
            if name.endswith("correction_bias"):
                w.copy_(torch.randn(w.shape, generator=g) * 0.2)
    return model.eval()


def tensors_of(model: torch.nn.Module) -> dict[str, Tensor]:
    biases = {name: w for name, w in model.named_buffers() if name.endswith("correction_bias")}
    return dict(model.named_parameters()) | biases


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
    "moe.router.w": "mlp.gate.weight",
    "moe.router.balance": "mlp.gate.e_score_correction_bias",
    **{f"moe.experts.w_{x}": "mlp.experts.gate_up_proj" for x in ("gate", "up")},
    "moe.experts.w_down": "mlp.experts.down_proj",
    **{f"moe.shared.w_{x}": f"mlp.shared_experts.{x}_proj.weight" for x in ("gate", "up", "down")},
}
ROTARY_LAST = ("w_q_up", "w_q", "w_kv_down")


AHEAD_NAMES = {
    "norm_h.scale": "hnorm.weight",
    "norm_token.scale": "enorm.weight",
    "w_token": "eh_proj.weight",  # the first half of its columns
    "w_h": "eh_proj.weight",
    "norm.scale": "post_norm.weight",
    **{f"block.{ours}": f"mtp_block.{theirs}" for ours, theirs in NAMES.items()},
}


def mapped(theirs: dict[str, Any], m: ModelConfig, permuted: bool = True) -> Transformer:
    used = set()

    def convert(w: WeightSpec) -> Tensor:
        part, i, name = re.fullmatch(r"(?:(blocks|mtp)\.(\d+)\.)?(.+)", w.path).groups()
        prefix = {None: "", "blocks": f"model.layers.{i}.", "mtp": f"layers.{i}."}[part]
        source = prefix + (AHEAD_NAMES if part == "mtp" else NAMES)[name]
        used.add(source)
        x = theirs[source].detach()
        if w.axes[0] == "vocab":
            return F.pad(x, (0, 0, 0, w.shape[0] - len(x)), value=1.0)
        if "gate_up" in source:
            x = x.chunk(2, dim=1)[name.endswith("up")]
        if "eh_proj" in source:
            x = x.chunk(2, dim=1)[name == "w_h"]
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
        params = mapped(tensors_of(model), m, permuted)
        got = predict(params, make_batch(rows, ONE), m, ONE)
    assert got.dtype == want.dtype == torch.float32 and got.shape == want.shape
    return ((got - want).abs().max() / want.abs().max()).item()


CASES = {
    "v3": (V3, "DeepseekV3", {"rope": replace(YARN, mscale_all=0.7)}),
    "v3-unstretched": (
        replace(V3, rope=RopeConfig(100.0)),
        "DeepseekV3",
        {"rope": RopeConfig(90.0)},
    ),
    "v2-lite": (LITE, "DeepseekV2", {"rope": replace(YARN, mscale=0.9)}),
    "v3-experts": (replace(V3, moe=EXPERTS), "DeepseekV3", {"moe": replace(EXPERTS, groups=2)}),
    "v2-lite-experts": (
        replace(LITE, moe=LITE_EXPERTS),
        "DeepseekV2",
        {"moe": replace(LITE_EXPERTS, normalize=True)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_logits(name):
    """The comparison notices a slightly wrong config, and weights in another order."""
    m, kind, wrong = CASES[name]
    model = transformers_model(kind, m)
    assert differ(model, m) <= 1e-5
    assert differ(model, replace(m, **wrong)) > 1e-3
    assert differ(model, m, permuted=False) > 1e-3


def test_losses_of_predictions_ahead():
    """Two modules with experts. In transformers they serve for drafting and run one at a time."""
    from transformers.modeling_layers import MtpModel

    m = replace(V3, moe=EXPERTS, mtp=MTPConfig(2))
    model, rows = transformers_model("DeepseekV3", m), random_rows(1)
    ahead = MtpModel(model, 2)
    modules = random_weights(ahead.layers)
    places, want = torch.arange(48)[None], []
    with torch.no_grad():
        h = model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
        for k in (1, 2):
            tokens = F.pad(rows[:, k:], (0, k - 1))
            h = ahead.forward_layer(k - 1, h, places, None, input_ids=tokens)
            targets = F.pad(rows[:, k + 1 :], (0, k), value=IGNORE)
            logits = model.lm_head(h).flatten(0, 1)
            want.append(
                F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum")
            )
    theirs = tensors_of(model) | {f"layers.{name}": w for name, w in tensors_of(modules).items()}

    def losses(params: Transformer) -> Tensor:
        batch = make_batch(rows, ONE, depth=2)
        with torch.no_grad():
            return stage(params, embed(params, batch, m, ONE), batch, m=m, layout=ONE)[1].report[
                "mtp"
            ]

    params = mapped(theirs, m)
    torch.testing.assert_close(losses(params), torch.stack(want), rtol=1e-5, atol=0)
    first, second = params.mtp
    for wrong in ((second, first), (replace(first, w_h=first.w_token, w_token=first.w_h), second)):
        assert (losses(replace(params, mtp=wrong)) / torch.stack(want) - 1).abs().max() > 1e-2
