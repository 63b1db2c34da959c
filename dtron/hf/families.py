"""Tables of the model families: the weights and the config.json of each family.

weight_tables.py has the place of each weight. Here a row of keys is ``dtron's field: Hugging Face's
key``. A model belongs to a family if these tables can express all its properties. No property is
guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dtron.errors import UserError
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
    ``keys``: dtron's fields and the keys of config.json; ``a|b`` if a key has had two names.
    ``defaults``: the values of keys that config.json may lack.
    ``fixed``: the fields that all models of the family share.
    ``demands``: keys for which dtron computes one value only. A missing key has this value.
    ``ignored``: patterns of tensors that are no weights of the model. ``{later}`` is the number of
    a block after the model's last.
    ``prefix``: the prefix of tensor names.
    ``read(entries, fields)``: more fields, where the tables do not suffice.
    ``write(model)``: more entries of config.json, where the tables do not suffice."""

    kind: str
    architecture: str
    weights: Mapping[str, tables.Row]
    keys: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    demands: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
    prefix: str = "model."
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]] = _no_fields
    write: Callable[[ModelConfig], dict[str, Any]] = _no_entries


# ---------------------------------------------------------------------------- keys

_SIZES = {
    "vocab": "vocab_size",
    "embed": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "context": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "mlp": "intermediate_size",
    "tied": "tie_word_embeddings",
}
_LLAMA_KEYS = _SIZES | {"kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
_WINDOW = {"window": "sliding_window"}
_MOE = {"moe.top_k": "num_experts_per_tok", "moe.mlp": "moe_intermediate_size"}
_QWEN3_MOE = _MOE | {
    "moe.experts": "num_experts|num_local_experts",
    "moe.normalize": "norm_topk_prob",
}
_LOCAL_EXPERTS = {
    "moe.experts": "num_local_experts",
    "moe.top_k": "num_experts_per_tok",
    "moe.mlp": "intermediate_size",
}
_GPT2_KEYS = {
    "vocab": "vocab_size",
    "embed": "n_embd",
    "layers": "n_layer",
    "heads": "n_head",
    "context": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "mlp": "n_inner",
    "tied": "tie_word_embeddings",
}
_DEEPSEEK_KEYS = {
    **_SIZES,
    **_MOE,
    "mla.kv_rank": "kv_lora_rank",
    "mla.q_rank": "q_lora_rank",
    "mla.nope_dim": "qk_nope_head_dim",
    "mla.rope_dim": "qk_rope_head_dim",
    "mla.v_dim": "v_head_dim",
    "moe.experts": "n_routed_experts",
    "moe.dense_layers": "first_k_dense_replace",
    "moe.scale": "routed_scaling_factor",
    "moe.normalize": "norm_topk_prob",
    "moe.groups": "n_group",
    "moe.group_top_k": "topk_group",
}

# Defaults of keys that config.json may lack. config.py computes the fields that are None here: all
# heads, embed / heads, 4 * embed.
_DEFAULTS = {
    "tie_word_embeddings": False,
    "num_key_value_heads": None,
    "head_dim": None,
    "sliding_window": None,
}

_SILU = {"hidden_act": "silu", "attention_bias": False}
_NO_WINDOW = {"use_sliding_window": False}
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


def _write_deepseek_v2(m: ModelConfig) -> dict[str, Any]:
    method = "greedy" if m.moe.groups == 1 else "group_limited_greedy"
    return _write_deepseek(m) | {"topk_method": method}


def _alternating(layers: int) -> list[str]:
    """Return layer types in which the first and then every other layer has a window."""
    return [f"{'sliding' if i % 2 == 0 else 'full'}_attention" for i in range(layers)]


def _read_gpt_oss(entries: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    types = entries.get("layer_types")
    if types and types != _alternating(len(types)):
        raise UserError(
            f"layer_types {types}: in gpt-oss every other layer has a window, the first does"
        )
    return {}


def _write_gpt_oss(m: ModelConfig) -> dict[str, Any]:
    return {"layer_types": _alternating(m.layers)}


# ---------------------------------------------------------------------------- families

FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        weights=_DENSE,
        keys=_LLAMA_KEYS,
        defaults=_DEFAULTS,
        demands=_SILU | {"mlp_bias": False},
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        weights=_DENSE,
        keys=_LLAMA_KEYS | _WINDOW,
        defaults=_DEFAULTS,
        demands={"hidden_act": "silu"},
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        weights=_DENSE,
        keys=_LLAMA_KEYS,
        defaults=_DEFAULTS,
        fixed={"qkv_bias": True},
        demands={"hidden_act": "silu"} | _NO_WINDOW,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        weights=_DENSE,
        keys=_LLAMA_KEYS,
        defaults=_DEFAULTS,
        fixed={"qk_norm": True},
        demands=_SILU | _NO_WINDOW,
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        weights=tables.GPT2_ENDS | tables.GPT2_BLOCK,
        keys=_GPT2_KEYS,
        defaults={"tie_word_embeddings": True, "n_inner": None},
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
        keys=_LLAMA_KEYS | _LOCAL_EXPERTS | _WINDOW,
        defaults=_DEFAULTS,
        demands={"hidden_act": "silu"},
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        weights=tables.ENDS | tables.NORMS | tables.ATTENTION | tables.EXPERTS,
        keys=_LLAMA_KEYS | _QWEN3_MOE,
        defaults=_DEFAULTS | {"norm_topk_prob": False},
        fixed={"qk_norm": True},
        demands=_SILU | _NO_WINDOW | {"decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    Family(
        "gpt_oss",
        "GptOssForCausalLM",
        weights=tables.ENDS | tables.NORMS | tables.ATTENTION | tables.GPT_OSS_EXPERTS,
        keys=_LLAMA_KEYS | _LOCAL_EXPERTS | _WINDOW,
        defaults=_DEFAULTS,
        fixed={
            "qkv_bias": True,
            "bias": True,
            "sinks": True,
            "full_every": 2,
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
        read=_read_gpt_oss,
        write=_write_gpt_oss,
    ),
    Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        weights=tables.ENDS | _DEEPSEEK_BLOCK,
        keys=_DEEPSEEK_KEYS,
        defaults=_DEFAULTS | {"n_group": 1, "topk_group": 1},
        demands=_DEEPSEEK_DEMANDS | {"norm_topk_prob": False, "scoring_func": "softmax"},
        read=_read_deepseek,
        write=_write_deepseek_v2,
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        weights=tables.ENDS | _DEEPSEEK_BLOCK | tables.mtp_module(_DEEPSEEK_BLOCK),
        keys=_DEEPSEEK_KEYS,
        defaults=_DEFAULTS,
        fixed={"moe.score": "sigmoid", "moe.bias_rate": 0.001},
        demands={
            **_DEEPSEEK_DEMANDS,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "rope_interleave": True,
        },
        ignored=(r".*\.rotary_emb\.inv_freq", r"model\.layers\.{later}\..*"),
        read=_read_deepseek,
        write=_write_deepseek,
    ),
)
