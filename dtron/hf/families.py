"""The model families of Hugging Face: the weights and the config.json of each family.

weight_tables.py has the place of each weight, and config_keys.py the keys of config.json with their
defaults. A model belongs to a family if these tables can express all its properties. No property is
guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dtron.errors import UserError
from dtron.hf import config_keys as keys
from dtron.hf import layer_types
from dtron.hf import weight_tables as tables
from dtron.model.config import ModelConfig


def _no_fields(entries: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _no_entries(m: ModelConfig) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """A model family of Hugging Face.

    ``kind``: the ``model_type`` in config.json.
    ``architecture``: the entry of ``architectures`` in config.json.
    ``weights``: the place of each weight.
    ``keys``: dtron's fields and the keys of config.json; ``a|b`` if a key has two names.
    ``defaults``: the values of keys that config.json lacks, in Hugging Face's names.
    ``fixed``: the fields that all models of the family share.
    ``demands``: keys for which dtron computes one value only. A missing key has this value.
    ``stacked``: the places of weights in the folders that have all experts in one tensor.
    ``ignored``: patterns of tensors that are no weights of the model. ``{later}`` is the number of
    a block after the model's last.
    ``prefix``: the prefix of tensor names.
    ``read(entries, fields)``: more fields, where the tables do not suffice. ``entries`` has the
    defaults of keys that config.json lacks.
    ``write(model)``: more entries of config.json, where the tables do not suffice."""

    kind: str
    architecture: str
    weights: Mapping[str, tables.Row]
    keys: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    demands: Mapping[str, Any] = field(default_factory=dict)
    stacked: Mapping[str, tables.Row] = field(default_factory=dict)
    ignored: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
    prefix: str = "model."
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]] = _no_fields
    write: Callable[[ModelConfig], dict[str, Any]] = _no_entries


_SILU = {"hidden_act": "silu", "attention_bias": False}
_DEEPSEEK_DEMANDS = _SILU | {"moe_layer_freq": 1}

_DENSE = tables.ENDS | tables.NORMS | tables.ATTENTION | tables.MLP
_DEEPSEEK_BLOCK = tables.NORMS | tables.LATENT | tables.MLP | tables.EXPERTS


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


def _read_deepseek_v2(entries: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    if entries["topk_method"] not in ("greedy", "group_limited_greedy"):
        raise UserError(f"topk_method is {entries['topk_method']!r}")
    return _read_deepseek(entries, fields)


def _write_deepseek_v2(m: ModelConfig) -> dict[str, Any]:
    method = "greedy" if m.moe.groups == 1 else "group_limited_greedy"
    return _write_deepseek(m) | {"topk_method": method}


# ---------------------------------------------------------------------------- families

FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        weights=_DENSE,
        keys=keys.LLAMA_KEYS,
        defaults=keys.LLAMA,
        demands=_SILU | {"mlp_bias": False},
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        weights=_DENSE,
        keys=keys.MISTRAL_KEYS,
        defaults=keys.MISTRAL,
        demands={"hidden_act": "silu"},
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        weights=_DENSE,
        keys=keys.LLAMA_KEYS,
        defaults=keys.QWEN2,
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
        defaults=keys.QWEN3,
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
        defaults=keys.GPT2,
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
        "mixtral",
        "MixtralForCausalLM",
        weights=tables.ENDS | tables.NORMS | tables.ATTENTION | tables.MIXTRAL_EXPERTS,
        keys=keys.MIXTRAL_KEYS,
        defaults=keys.MIXTRAL,
        demands={"hidden_act": "silu"},
        stacked=tables.MIXTRAL_STACKED,
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        weights=tables.ENDS | tables.NORMS | tables.ATTENTION | tables.EXPERTS,
        keys=keys.QWEN3_MOE_KEYS,
        defaults=keys.QWEN3_MOE,
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
        defaults=keys.GPT_OSS,
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
        write=layer_types.write_gpt_oss,
    ),
    Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        weights=tables.ENDS | _DEEPSEEK_BLOCK,
        keys=keys.DEEPSEEK_KEYS,
        defaults=keys.DEEPSEEK_V2,
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
        weights=tables.ENDS | _DEEPSEEK_BLOCK | tables.mtp_module(_DEEPSEEK_BLOCK),
        keys=keys.DEEPSEEK_KEYS,
        defaults=keys.DEEPSEEK_V3,
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
)
