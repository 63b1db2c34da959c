"""The model families of Hugging Face with experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dtron.errors import UserError
from dtron.hf import config_defaults as defaults
from dtron.hf import config_keys as keys
from dtron.hf import layer_types
from dtron.hf import weight_tables as tables
from dtron.hf.family import Family
from dtron.hf.rope_config import RopeFormat
from dtron.model.config import ModelConfig

_SILU = {"hidden_act": "silu", "attention_bias": False}
_DEEPSEEK_DEMANDS = _SILU | {"moe_layer_freq": 1}
_DEEPSEEK_BLOCK = tables.NORMS | tables.LATENT | tables.MLP | tables.EXPERTS
_DEEPSEEK_V32_BLOCK = _DEEPSEEK_BLOCK | tables.INDEXER
_ATTENTION = {path: row for path, row in tables.ATTENTION.items() if "norm" not in path}

# ---------------------------------------------------------------------------- beyond the tables


def _read_deepseek(entries: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    more = {
        "mla.q_rank": fields["mla.q_rank"] or 0,
        "moe.shared": fields["moe.mlp"] * entries["n_shared_experts"],
    }
    if entries.get("topk_method") == "greedy":
        return more | {"moe.groups": 1, "moe.group_top_k": 1}
    return more | {name: fields[name] or 1 for name in ("moe.groups", "moe.group_top_k")}


def _write_deepseek(m: ModelConfig) -> dict[str, Any]:
    return {
        "q_lora_rank": m.mla.q_rank or None,
        "n_shared_experts": m.moe.shared // m.moe.mlp,
        "num_key_value_heads": m.heads,
        "head_dim": m.mla.rope_dim,
    }


def _read_deepseek_v32(entries: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """A list of the layers' types counts, and not the number of dense layers."""
    types, more = entries["mlp_layer_types"], _read_deepseek(entries, fields)
    if types is None:
        return more
    if not set(types) <= {"dense", "sparse"} or len(types) != fields["layers"]:
        raise UserError(f"mlp_layer_types is {types} for {fields['layers']} layers")
    kinds = "".join("DF"[kind == "sparse"] for kind in types)
    return more | {"feed_forwards": kinds, "moe.dense_layers": 0}


def _write_deepseek_v32(m: ModelConfig) -> dict[str, Any]:
    types = [("dense", "sparse")[m.sparse(i)] for i in range(m.layers)]
    first = next((i for i in range(m.layers) if m.sparse(i)), m.layers)
    return _write_deepseek(m) | {"mlp_layer_types": types, "first_k_dense_replace": first}


def _read_deepseek_v2(entries: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    if entries["topk_method"] not in ("greedy", "group_limited_greedy"):
        raise UserError(f"topk_method is {entries['topk_method']!r}")
    return _read_deepseek(entries, fields)


def _write_deepseek_v2(m: ModelConfig) -> dict[str, Any]:
    method = "greedy" if m.moe.groups == 1 else "group_limited_greedy"
    return _write_deepseek(m) | {"topk_method": method}


def _read_glm4_moe(entries: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "moe.shared": fields["moe.mlp"] * entries["n_shared_experts"],
        "moe.groups": fields["moe.groups"] or 1,
        "moe.group_top_k": fields["moe.group_top_k"] or 1,
    }


def _read_llama4(entries: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Every nth layer has experts, if nothing else is said."""
    sparse, step = entries["moe_layers"], entries["interleave_moe_layer_step"]
    if sparse is None:
        sparse = range(step - 1, fields["layers"], step)
    kinds = "".join("DF"[i in sparse] for i in range(fields["layers"]))
    return layer_types.read_llama4(entries, fields) | {
        "feed_forwards": kinds,
        "qk_norm_over": "rotated" if fields["qk_norm"] else "head",
    }


def _write_llama4(m: ModelConfig) -> dict[str, Any]:
    return layer_types.write_llama4(m) | {
        "moe_layers": [i for i in range(m.layers) if m.sparse(i)],
        "interleave_moe_layer_step": 1,
    }


def _write_shared(m: ModelConfig) -> dict[str, Any]:
    return {"n_shared_experts": m.moe.shared // m.moe.mlp}


# ---------------------------------------------------------------------------- families

EXPERTS = (
    Family(
        "mixtral",
        "MixtralForCausalLM",
        weights=tables.ENDS | tables.NORMS | tables.ATTENTION | tables.MIXTRAL_EXPERTS,
        keys=keys.MIXTRAL_KEYS,
        defaults=defaults.MIXTRAL,
        demands={"hidden_act": "silu"},
        stacked=tables.MIXTRAL_STACKED,
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        weights=tables.ENDS | tables.NORMS | tables.ATTENTION | tables.EXPERTS,
        keys=keys.QWEN3_MOE_KEYS,
        defaults=defaults.QWEN3_MOE,
        fixed={"qk_norm": True},
        demands=_SILU | {"decoder_sparse_step": 1, "mlp_only_layers": []},
        stacked=tables.STACKED_EXPERTS,
        read=layer_types.read_qwen3_moe,
        write=layer_types.write_qwen3_moe,
    ),
    Family(
        "gpt_oss",
        "GptOssForCausalLM",
        weights=tables.ENDS | tables.NORMS | tables.ATTENTION | tables.GPT_OSS_EXPERTS,
        keys=keys.GPT_OSS_KEYS,
        defaults=defaults.GPT_OSS,
        fixed={
            "qkv_bias": True,
            "bias": True,
            "sinks": True,
            "moe.score": "topk_softmax",
            "moe.router_bias": True,
            "moe.bias": True,
            "moe.activation": "clamped_swiglu",
        },
        demands={
            "hidden_act": "silu",
            "attention_bias": True,
            "swiglu_limit": 7.0,
            "swiglu_alpha": 1.702,
        },
        read=layer_types.read_gpt_oss,
        write=layer_types.write_windows,
    ),
    Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        weights=tables.ENDS | _DEEPSEEK_BLOCK,
        keys=keys.DEEPSEEK_KEYS,
        rope=RopeFormat(latent=True),
        defaults=defaults.DEEPSEEK_V2,
        demands={
            **_DEEPSEEK_DEMANDS,
            "mlp_bias": False,
            "norm_topk_prob": False,
            "scoring_func": "softmax",
        },
        stacked=tables.STACKED_EXPERTS,
        read=_read_deepseek_v2,
        write=_write_deepseek_v2,
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        aliases=("kimi_k2",),
        weights=tables.ENDS | _DEEPSEEK_BLOCK | tables.mtp_module(_DEEPSEEK_BLOCK),
        keys=keys.DEEPSEEK_KEYS,
        rope=RopeFormat(latent=True),
        defaults=defaults.DEEPSEEK_V3,
        fixed={"moe.score": "sigmoid", "moe.bias_rate": 0.001},
        demands={
            **_DEEPSEEK_DEMANDS,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "rope_interleave": True,
        },
        stacked=tables.STACKED_EXPERTS,
        ignored=(r".*\.rotary_emb\.inv_freq", r"model\.layers\.{later}\..*"),
        read=_read_deepseek,
        write=_write_deepseek,
    ),
    Family(
        "deepseek_v32",
        "DeepseekV32ForCausalLM",
        weights=tables.ENDS | _DEEPSEEK_V32_BLOCK | tables.mtp_module(_DEEPSEEK_V32_BLOCK),
        keys=keys.DEEPSEEK_V32_KEYS,
        rope=RopeFormat(latent=True),
        defaults=defaults.DEEPSEEK_V32,
        fixed={"pattern": "I", "moe.score": "sigmoid", "moe.bias_rate": 0.001},
        demands={
            **_DEEPSEEK_DEMANDS,
            "mlp_bias": False,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        },
        stacked=tables.STACKED_EXPERTS,
        ignored=(r".*\.rotary_emb\.inv_freq", r"model\.layers\.{later}\..*"),
        read=_read_deepseek_v32,
        write=_write_deepseek_v32,
    ),
    Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        weights=tables.ENDS | tables.NORMS | tables.ATTENTION | tables.MLP | tables.EXPERTS,
        keys=keys.GLM4_MOE_KEYS,
        defaults=defaults.GLM4_MOE,
        fixed={"moe.score": "sigmoid", "moe.bias_rate": 0.001},
        demands={"hidden_act": "silu"},
        stacked=tables.STACKED_EXPERTS,
        ignored=(r".*\.rotary_emb\.inv_freq", r"model\.layers\.{later}\..*"),
        rope=RopeFormat(partial=0.5),
        read=_read_glm4_moe,
        write=_write_shared,
    ),
    Family(
        "minimax_m2",
        "MiniMaxM2ForCausalLM",
        weights=tables.ENDS
        | tables.NORMS
        | _ATTENTION
        | tables.QK_HEADS_NORM
        | tables.MINIMAX_EXPERTS,
        keys=keys.MINIMAX_M2_KEYS,
        defaults=defaults.MINIMAX_M2,
        fixed={
            "qk_norm": True,
            "qk_norm_over": "projection",
            "moe.score": "sigmoid",
            "moe.bias_rate": 0.001,
        },
        demands={"hidden_act": "silu"},
        stacked=tables.MINIMAX_STACKED,
        rope=RopeFormat(partial=1.0, partial_key="rotary_dim"),
    ),
    Family(
        "llama4_text",
        "Llama4ForCausalLM",
        container="llama4",
        weights=tables.ENDS | tables.NORMS | tables.LLAMA4_BLOCK,
        keys=keys.LLAMA4_KEYS,
        defaults=defaults.LLAMA4,
        fixed={
            "moe.score": "sigmoid",
            "moe.normalize": False,
            "moe.scores_on": "inputs",
            "window_kind": "chunked",
        },
        demands=_SILU,
        ignored=(r".*\.rotary_emb\.inv_freq", r"vision_model\..*", r"multi_modal_projector\..*"),
        renamed=((r"^language_model\.", ""),),
        read=_read_llama4,
        write=_write_llama4,
    ),
)
