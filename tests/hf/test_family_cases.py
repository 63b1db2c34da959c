"""Single keys of newer families, each with a wrong reading that the comparison notices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dtron.errors import UserError
from dtron.hf import Source
from dtron.model.config import ModelConfig
from tests.helpers.hf_configs import saved
from tests.hf.test_families import logits
from tests.hf.test_random_configs import compare, config_of, fields, rope, theirs, yarn

pytest.importorskip("transformers")

LAYERED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
LOCAL = {"rope_type": "default", "rope_theta": 60.0}
GLOBAL = {"rope_type": "default", "rope_theta": 900.0}
EXPERTS = {"n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 16, "first_k_dense_replace": 1}
NEXT = {
    "full_attention_interval": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 4,
}
DELTA = {key: value for key, value in NEXT.items() if "linear" in key or "interval" in key}
EQUAL = {  # transformers saves channels in three equal parts
    "pad_token_id": None,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 6,
}
NEMOTRON = {
    "num_hidden_layers": "drop",
    "hybrid_override_pattern": "M-*-",
    "mamba_num_heads": 4,
    "mamba_head_dim": 6,
    "n_groups": 2,
    "ssm_state_size": 4,
}
KIMI = {
    "model_max_length": 64,
    "max_position_embeddings": "drop",
    "head_dim": "drop",
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "linear_num_heads": 2,
    "linear_head_dim": 6,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_token": 2,
    "pad_token_id": None,
}
GEMMA = {"query_pre_attn_scalar": 60, "pad_token_id": 0}


LLAMA4 = {
    "num_local_experts": 4,
    "intermediate_size": 16,
    "intermediate_size_mlp": 48,
    "no_rope_layers": [1, 0],
    "attention_chunk_size": 6,
    "floor_scale": 4,
    "attn_scale": 0.5,
}


def experts(**values: Any) -> Callable[[ModelConfig], ModelConfig]:
    return lambda m: replace(m, moe=replace(m.moe, **values))


def mamba(**values: Any) -> Callable[[ModelConfig], ModelConfig]:
    return lambda m: replace(m, mamba=replace(m.mamba, **values))


# By name: the class in transformers, its config.json, and a wrong reading of it.
CASES = {
    "linear scaling": (
        "Llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        rope(scaling="none"),
    ),
    "olmo2's norms of all heads": ("Olmo2", {"rms_norm_eps": 1e-2}, fields(norm_eps=1e-5)),
    "olmo3 scales layers without a window alone": (
        "Olmo3",
        LAYERED | {"rope_scaling": yarn(), "rope_theta": 500_000.0},
        fields(window_rope_theta=None),
    ),
    "olmo3's windows never have rope_theta": (
        "Olmo3",
        LAYERED | {"rope_theta": 60.0},
        fields(window_rope_theta=60.0),
    ),
    "gemma2's scale of embeddings": ("Gemma2", GEMMA, fields(embedding_scale=1.0)),
    "gemma2's scale of scores": ("Gemma2", GEMMA, fields(attention_scale=None)),
    "gemma2's soft-cap of scores": (
        "Gemma2",
        GEMMA | {"attn_logit_softcapping": 0.5},
        fields(softcap=None),
    ),
    "gemma2's soft-cap of logits": (
        "Gemma2",
        GEMMA | {"final_logit_softcapping": 2.0},
        fields(final_softcap=None),
    ),
    "gemma3's local RoPE": (
        "Gemma3Text",
        GEMMA
        | LAYERED
        | {"rope_parameters": {"full_attention": GLOBAL, "sliding_attention": LOCAL}},
        fields(window_rope_theta=None),
    ),
    "gemma3's old keys of RoPE": (
        "Gemma3Text",
        GEMMA | LAYERED | {"rope_theta": 900.0, "rope_local_base_freq": 60.0},
        fields(window_rope_theta=None),
    ),
    "a part of phi3's heads": (
        "Phi3",
        {"partial_rotary_factor": 0.5, "pad_token_id": 0},
        rope(partial=1.0),
    ),
    "smollm3 without positions": (
        "SmolLM3",
        {"no_rope_layers": [1, 0], "pad_token_id": 0, "rope_theta": 60.0},
        fields(pattern="A"),
    ),
    "granite's residuals": ("Granite", {"residual_multiplier": 0.5}, fields(residual_scale=1.0)),
    "granite's logits": ("Granite", {"logits_scaling": 2.0}, fields(logit_scale=1.0)),
    "half of glm4's heads, if nothing is said": ("Glm4Moe", EXPERTS, rope(partial=1.0)),
    "a quarter of qwen3-next's heads, if nothing is said": ("Qwen3Next", NEXT, rope(partial=1.0)),
    "qwen3-next's layers without experts": ("Qwen3Next", NEXT | {"mlp_only_layers": [1]}, None),
    "a quarter of qwen3.5's heads, if nothing is said": ("Qwen3_5Text", DELTA, rope(partial=1.0)),
    "positions of images have no effect on text": (
        "Qwen3_5Text",
        DELTA
        | {"head_dim": 16, "rope_parameters": {"rope_theta": 60.0, "mrope_section": [1, 0, 1]}},
        rope(theta=1e4),
    ),
    "olmo-hybrid without positions": (
        "OlmoHybrid",
        {"rope_parameters": {"rope_theta": None}} | EQUAL,
        fields(pattern="LA", post_norm_mixers="A"),
    ),
    "olmo-hybrid's norm of outputs": (
        "OlmoHybrid",
        {"rms_norm_eps": 0.1} | EQUAL,
        lambda m: replace(m, delta=replace(m.delta, norm_eps=None)),
    ),
    "olmo-hybrid's eigenvalues": (
        "OlmoHybrid",
        EQUAL,
        lambda m: replace(m, delta=replace(m.delta, negative_eigenvalues=False)),
    ),
    "olmo-hybrid has attention in the last of few layers": ("OlmoHybrid", EQUAL, None),
    "llama4's chunks": ("Llama4Text", LLAMA4, fields(window_kind="sliding")),
    "llama4's norm after rotation": (
        "Llama4Text",
        LLAMA4,
        fields(qk_norm=False, qk_norm_over="head"),
    ),
    "llama4's factor of queries": ("Llama4Text", LLAMA4, fields(attention_temperature=0.0)),
    "llama4's scores": ("Llama4Text", LLAMA4, experts(scores_on="outputs")),
    "llama4's layers without experts": ("Llama4Text", LLAMA4 | {"moe_layers": [1]}, None),
    "nemotron-h's least time step": (
        "NemotronH",
        NEMOTRON | {"time_step_min": 0.8},
        mamba(time_step_min=0.0),
    ),
    "nemotron-h's attention has no positions": (
        "NemotronH",
        NEMOTRON,
        fields(pattern="S_A_"),
    ),
    "kimi-linear numbers its layers from 1": (
        "KimiLinear",
        KIMI | {"linear_attn_config": {"kda_layers": [2], "full_attn_layers": [1]}},
        None,
    ),
    "kimi-linear's latent attention has no positions": (
        "KimiLinear",
        KIMI | {"layer_types": ["linear_attention", "full_attention"]},
        fields(pattern="KM"),
    ),
    "minimax-m2's rotary_dim": ("MiniMaxM2", EXPERTS | {"rotary_dim": 4}, rope(partial=1.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_case(name):
    kind, changes, wrong = CASES[name]
    with saved(kind, config_of(kind, **changes), "plain") as at:
        assert compare(at) == "equal"
        if wrong is None:
            return
        want, source = theirs(at), Source(at)
        bad = Source(at, wrong(source.model))
        assert (logits(bad, torch.float64) - want).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("Gemma3Text", {"attn_logit_softcapping": 3.0}, "attn_logit_softcapping is 3.0"),
        ("Gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        (
            "Olmo3",
            {"rope_parameters": {"full_attention": GLOBAL, "sliding_attention": yarn()}},
            "RoPE of layers with a window is scaled",
        ),
        ("SeedOss", {"mlp_bias": True}, "mlp_bias is True"),
        ("NemotronH", NEMOTRON | {"hybrid_override_pattern": "ME"}, "layer_types has moe"),
        ("Llama", {"partial_rotary_factor": 0.5}, "rotates part of a head only"),
    ],
)
def test_what_is_refused(kind, changes, said):
    with saved(kind, config_of(kind, **changes), "plain") as at:
        with pytest.raises(UserError, match=said) as error:
            Source(at)
        assert "\n" not in str(error.value)
