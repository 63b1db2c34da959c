"""The dense model families of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dtron.hf import config_defaults as defaults
from dtron.hf import config_keys as keys
from dtron.hf import layer_types
from dtron.hf import weight_tables as tables
from dtron.hf.family import Family
from dtron.hf.rope_config import RopeFormat
from dtron.model.config import ModelConfig

_SILU = {"hidden_act": "silu", "attention_bias": False}
_DENSE = tables.ENDS | tables.NORMS | tables.ATTENTION | tables.MLP
_ATTENTION = {path: row for path, row in tables.ATTENTION.items() if "norm" not in path}
_OLMO = tables.ENDS | tables.OLMO_BLOCK | _ATTENTION | tables.QK_HEADS_NORM | tables.MLP
_GEMMA = tables.zero_centered(tables.ENDS | tables.GEMMA_NORMS | tables.ATTENTION | tables.MLP)
_OLMO_FIXED = {"norm_position": "post", "qk_norm": True, "qk_norm_over": "projection"}
_GEMMA_FIXED = {"norm_position": "sandwich", "activation": "geglu"}
_GEMMA_DEMANDS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "use_bidirectional_attention": False,
}

# ---------------------------------------------------------------------------- beyond the tables


def _read_gemma2(entries: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    return _gemma_scales(entries, fields) | layer_types.read_periodic(entries, fields, 2)


def _read_gemma3(entries: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    period = entries["sliding_window_pattern"]
    return _gemma_scales(entries, fields) | layer_types.read_periodic(entries, fields, period)


def _gemma_scales(entries: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    scale = entries["query_pre_attn_scalar"] ** -0.5
    return {"embedding_scale": fields["embed"] ** 0.5, "attention_scale": scale}


def _write_gemma(m: ModelConfig) -> dict[str, Any]:
    scale = m.head_dim**-0.5 if m.attention_scale is None else m.attention_scale
    return {"query_pre_attn_scalar": round(scale**-2), **layer_types.write_windows(m)}


def _read_olmo3(entries: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    return layer_types.read_periodic(entries, fields, 4)


def _read_granite(entries: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"logit_scale": 1 / entries["logits_scaling"]}


def _write_granite(m: ModelConfig) -> dict[str, Any]:
    scale = m.head_dim**-0.5 if m.attention_scale is None else m.attention_scale
    return {"attention_multiplier": scale, "logits_scaling": round(1 / m.logit_scale, 9)}


# ---------------------------------------------------------------------------- families

DENSE = (
    Family(
        "llama",
        "LlamaForCausalLM",
        weights=_DENSE,
        keys=keys.LLAMA_KEYS,
        defaults=defaults.LLAMA,
        demands=_SILU | {"mlp_bias": False},
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        weights=_DENSE,
        keys=keys.MISTRAL_KEYS,
        defaults=defaults.MISTRAL,
        demands={"hidden_act": "silu"},
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        weights=_DENSE,
        keys=keys.LLAMA_KEYS,
        defaults=defaults.QWEN2,
        fixed={"qkv_bias": True},
        demands={"hidden_act": "silu"},
        read=layer_types.read_qwen,
        write=layer_types.write_qwen,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        weights=_DENSE,
        keys=keys.LLAMA_KEYS,
        defaults=defaults.QWEN3,
        fixed={"qk_norm": True},
        demands=_SILU,
        read=layer_types.read_qwen,
        write=layer_types.write_qwen,
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        weights=tables.GPT2_ENDS | tables.GPT2_BLOCK,
        keys=keys.GPT2_KEYS,
        defaults=defaults.GPT2,
        fixed={
            "activation": "gelu",
            "norm": "layernorm",
            "positions": "learned",
            "qkv_bias": True,
            "bias": True,
        },
        demands={
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        ignored=(r".*\.attn\.(bias|masked_bias)",),
        prefix="transformer.",
    ),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        weights=_OLMO,
        keys=keys.LLAMA_KEYS,
        defaults=defaults.OLMO2,
        fixed=_OLMO_FIXED,
        demands=_SILU,
    ),
    Family(
        "olmo3",
        "Olmo3ForCausalLM",
        weights=_OLMO,
        keys=keys.LLAMA_KEYS,
        defaults=defaults.OLMO3,
        fixed=_OLMO_FIXED,
        demands=_SILU,
        rope=RopeFormat(window_theta=500_000.0),
        read=_read_olmo3,
        write=layer_types.write_windows,
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        weights=_GEMMA,
        keys=keys.GEMMA2_KEYS,
        defaults=defaults.GEMMA2,
        fixed=_GEMMA_FIXED,
        demands=_GEMMA_DEMANDS,
        read=_read_gemma2,
        write=_write_gemma,
    ),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        weights=_GEMMA,
        keys=keys.GEMMA3_KEYS,
        defaults=defaults.GEMMA3,
        fixed=_GEMMA_FIXED | {"qk_norm": True},
        demands=_GEMMA_DEMANDS | {"attn_logit_softcapping": None},
        rope=RopeFormat(window_theta=10_000.0, window_key="rope_local_base_freq"),
        read=_read_gemma3,
        write=_write_gemma,
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        weights=tables.ENDS | tables.NORMS | tables.PHI3_BLOCK,
        keys=keys.MISTRAL_KEYS,
        defaults=defaults.PHI3,
        demands={"hidden_act": "silu"},
        rope=RopeFormat(kinds=("default",), partial=1.0),
    ),
    Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        weights=_DENSE,
        keys=keys.LLAMA_KEYS,
        defaults=defaults.SMOLLM3,
        demands=_SILU | {"mlp_bias": False},
        read=layer_types.read_smollm3,
        write=layer_types.write_smollm3,
    ),
    Family(
        "seed_oss",
        "SeedOssForCausalLM",
        weights=_DENSE,
        keys=keys.LLAMA_KEYS | {"qkv_bias": "attention_bias"},
        defaults=defaults.SEED_OSS,
        demands={"hidden_act": "silu", "attention_out_bias": False, "mlp_bias": False},
    ),
    Family(
        "granite",
        "GraniteForCausalLM",
        weights=_DENSE,
        keys=keys.GRANITE_KEYS,
        defaults=defaults.GRANITE,
        demands=_SILU | {"mlp_bias": False},
        read=_read_granite,
        write=_write_granite,
    ),
)
