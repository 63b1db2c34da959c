"""The model families, as tables: where each of our weights is in their checkpoints, and each of our
sizes in their config.json.

A row of weights is ``our path: (their name, how it lies)``, with the notation of pattern.py for the
second. ``{l}`` is the number of a block and ``{e}`` that of an expert. A row of keys is ``our
field: their key``. A model belongs to a family if all that distinguishes it can be said in these
tables; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dtron.errors import UserError
from dtron.model.config import ModelConfig


class Row(NamedTuple):
    """``paired``: the rotary columns, the last of ours, stand in pairs there, see ``pattern.halves``."""

    name: str
    lies: str
    paired: bool = False


@dataclass(frozen=True)
class Family:
    """``kind`` and ``architecture``: as config.json has them. ``keys``: our fields by theirs, ``a|b`` where
    it has had two names. ``defaults``: of keys that config.json may lack. ``fixed``: fields that all models
    of the family share. ``demands``: keys for which we compute one value only; one that is not there has it.
    ``ignored``: tensors that are no weights of the model, ``{later}`` a number that its blocks end before.
    ``read(said, fields)`` and ``write(model)`` are for what is no table: more fields, and more keys."""

    kind: str
    architecture: str
    weights: Mapping[str, Row]
    keys: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    demands: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
    prefix: str = "model."
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]] = lambda said, fields: {}
    write: Callable[[ModelConfig], dict[str, Any]] = lambda m: {}


def _rows(block: str, rows: Mapping[str, tuple]) -> dict[str, Row]:
    """Rows whose names are within a block."""
    return {f"blocks.{{l}}.{path}": Row(block + row[0], *row[1:]) for path, row in rows.items()}


_ENDS = {
    "embedding.w_tokens": Row("model.embed_tokens.weight", "v d -> v d"),
    "norm.scale": Row("model.norm.weight", "d -> d"),
    "w_head": Row("lm_head.weight", "v d -> v d"),
}
_LAYER = "model.layers.{l}."
_NORMS = _rows(_LAYER, {
    "norm_1.scale": ("input_layernorm.weight", "d -> d"),
    "norm_2.scale": ("post_attention_layernorm.weight", "d -> d"),
})  # fmt: skip
_ATTENTION = _rows(_LAYER, {
    "attention.w_q": ("self_attn.q_proj.weight", "(n h) d -> d n h"),
    "attention.w_k": ("self_attn.k_proj.weight", "(k h) d -> d k h"),
    "attention.w_v": ("self_attn.v_proj.weight", "(k h) d -> d k h"),
    "attention.w_o": ("self_attn.o_proj.weight", "d (n h) -> n h d"),
    "attention.b_q": ("self_attn.q_proj.bias", "(n h) -> n h"),
    "attention.b_k": ("self_attn.k_proj.bias", "(k h) -> k h"),
    "attention.b_v": ("self_attn.v_proj.bias", "(k h) -> k h"),
    "attention.b_o": ("self_attn.o_proj.bias", "d -> d"),
    "attention.q_norm.scale": ("self_attn.q_norm.weight", "h -> h"),
    "attention.k_norm.scale": ("self_attn.k_norm.weight", "h -> h"),
    "attention.sinks": ("self_attn.sinks", "n -> n"),
})  # fmt: skip
_LATENT = _rows(_LAYER, {
    "mla.w_q_down": ("self_attn.q_a_proj.weight", "r d -> d r"),
    "mla.q_norm.scale": ("self_attn.q_a_layernorm.weight", "r -> r"),
    "mla.w_q_up": ("self_attn.q_b_proj.weight", "(n h) r -> r n h", True),
    "mla.w_q": ("self_attn.q_proj.weight", "(n h) d -> d n h", True),
    "mla.w_kv_down": ("self_attn.kv_a_proj_with_mqa.weight", "c d -> d c", True),
    "mla.kv_norm.scale": ("self_attn.kv_a_layernorm.weight", "r -> r"),
    "mla.w_kv_up": ("self_attn.kv_b_proj.weight", "(n c) r -> r n c"),
    "mla.w_o": ("self_attn.o_proj.weight", "d (n h) -> n h d"),
})  # fmt: skip
_MLP = _rows(_LAYER, {
    "mlp.w_gate": ("mlp.gate_proj.weight", "f d -> d f"),
    "mlp.w_up": ("mlp.up_proj.weight", "f d -> d f"),
    "mlp.w_down": ("mlp.down_proj.weight", "d f -> f d"),
    "mlp.b_up": ("mlp.up_proj.bias", "f -> f"),
    "mlp.b_down": ("mlp.down_proj.bias", "d -> d"),
})  # fmt: skip
_MIXTRAL = _rows(_LAYER + "block_sparse_moe.", {
    "moe.router.w": ("gate.weight", "e d -> d e"),
    "moe.experts.w_gate": ("experts.{e}.w1.weight", "f d -> e d f"),
    "moe.experts.w_up": ("experts.{e}.w3.weight", "f d -> e d f"),
    "moe.experts.w_down": ("experts.{e}.w2.weight", "d f -> e f d"),
})  # fmt: skip
_EXPERTS = _rows(_LAYER + "mlp.", {
    "moe.router.w": ("gate.weight", "e d -> d e"),
    "moe.router.balance": ("gate.e_score_correction_bias", "e -> e"),
    "moe.experts.w_gate": ("experts.{e}.gate_proj.weight", "f d -> e d f"),
    "moe.experts.w_up": ("experts.{e}.up_proj.weight", "f d -> e d f"),
    "moe.experts.w_down": ("experts.{e}.down_proj.weight", "d f -> e f d"),
    "moe.shared.w_gate": ("shared_experts.gate_proj.weight", "f d -> d f"),
    "moe.shared.w_up": ("shared_experts.up_proj.weight", "f d -> d f"),
    "moe.shared.w_down": ("shared_experts.down_proj.weight", "d f -> f d"),
})  # fmt: skip
_GPT_OSS = _rows(_LAYER + "mlp.", {
    "moe.router.w": ("router.weight", "e d -> d e"),
    "moe.router.b": ("router.bias", "e -> e"),
    "moe.experts.w_gate": ("experts.gate_up_proj", "e d (f 0/2) -> e d f"),
    "moe.experts.w_up": ("experts.gate_up_proj", "e d (f 1/2) -> e d f"),
    "moe.experts.w_down": ("experts.down_proj", "e f d -> e f d"),
    "moe.experts.b_gate": ("experts.gate_up_proj_bias", "e (f 0/2) -> e f"),
    "moe.experts.b_up": ("experts.gate_up_proj_bias", "e (f 1/2) -> e f"),
    "moe.experts.b_down": ("experts.down_proj_bias", "e d -> e d"),
})  # fmt: skip
_GPT2 = _rows("transformer.h.{l}.", {
    "norm_1.scale": ("ln_1.weight", "d -> d"),
    "norm_1.bias": ("ln_1.bias", "d -> d"),
    "attention.w_q": ("attn.c_attn.weight", "d (0/3 n h) -> d n h"),
    "attention.w_k": ("attn.c_attn.weight", "d (1/3 n h) -> d n h"),
    "attention.w_v": ("attn.c_attn.weight", "d (2/3 n h) -> d n h"),
    "attention.w_o": ("attn.c_proj.weight", "(n h) d -> n h d"),
    "attention.b_q": ("attn.c_attn.bias", "(0/3 n h) -> n h"),
    "attention.b_k": ("attn.c_attn.bias", "(1/3 n h) -> n h"),
    "attention.b_v": ("attn.c_attn.bias", "(2/3 n h) -> n h"),
    "attention.b_o": ("attn.c_proj.bias", "d -> d"),
    "norm_2.scale": ("ln_2.weight", "d -> d"),
    "norm_2.bias": ("ln_2.bias", "d -> d"),
    "mlp.w_up": ("mlp.c_fc.weight", "d f -> d f"),
    "mlp.b_up": ("mlp.c_fc.bias", "f -> f"),
    "mlp.w_down": ("mlp.c_proj.weight", "f d -> f d"),
    "mlp.b_down": ("mlp.c_proj.bias", "d -> d"),
})  # fmt: skip
_GPT2_ENDS = {
    "embedding.w_tokens": Row("transformer.wte.weight", "v d -> v d"),
    "embedding.w_positions": Row("transformer.wpe.weight", "s d -> s d"),
    "norm.scale": Row("transformer.ln_f.weight", "d -> d"),
    "norm.bias": Row("transformer.ln_f.bias", "d -> d"),
    "w_head": Row("lm_head.weight", "v d -> v d"),
}

_SIZES = {
    "vocab": "vocab_size", "embed": "hidden_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "context": "max_position_embeddings", "norm_eps": "rms_norm_eps",
    "mlp": "intermediate_size", "tied": "tie_word_embeddings",
}  # fmt: skip
_HEADS = {"kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
# Of keys that a config.json may lack. None is worked out: all heads, embed / heads, 4 * embed.
_LEFT_OUT = {
    "tie_word_embeddings": False, "num_key_value_heads": None, "head_dim": None, "sliding_window": None,
}  # fmt: skip
_SILU = {"hidden_act": "silu", "attention_bias": False}
_NO_WINDOW = {"use_sliding_window": False}

_DENSE = _ENDS | _NORMS | _ATTENTION | _MLP
_LLAMA_KEYS = _SIZES | _HEADS
_MOE = {"moe.top_k": "num_experts_per_tok", "moe.mlp": "moe_intermediate_size"}
_LOCAL = {
    "moe.experts": "num_local_experts",
    "moe.top_k": "num_experts_per_tok",
    "moe.mlp": "intermediate_size",
}


def _module(rows: Mapping[str, Row]) -> dict[str, Row]:
    """Multi-token prediction: module k is saved as a block after the last, with embedding and head
    again."""
    block = {f"mtp.{{l}}.block.{path[11:]}": row for path, row in rows.items()}
    return block | {
        "mtp.{l}.norm_h.scale": Row(_LAYER + "hnorm.weight", "d -> d"),
        "mtp.{l}.norm_token.scale": Row(_LAYER + "enorm.weight", "d -> d"),
        "mtp.{l}.w_token": Row(_LAYER + "eh_proj.weight", "d (0/2 c) -> c d"),
        "mtp.{l}.w_h": Row(_LAYER + "eh_proj.weight", "d (1/2 c) -> c d"),
        "mtp.{l}.norm.scale": Row(_LAYER + "shared_head.norm.weight", "d -> d"),
    }


_DEEPSEEK_BLOCK = _NORMS | _LATENT | _MLP | _EXPERTS
_DEEPSEEK_KEYS = _SIZES | _MOE | {
    "mla.kv_rank": "kv_lora_rank", "mla.q_rank": "q_lora_rank", "mla.nope_dim": "qk_nope_head_dim",
    "mla.rope_dim": "qk_rope_head_dim", "mla.v_dim": "v_head_dim", "moe.experts": "n_routed_experts",
    "moe.dense_layers": "first_k_dense_replace", "moe.scale": "routed_scaling_factor",
    "moe.normalize": "norm_topk_prob", "moe.groups": "n_group", "moe.group_top_k": "topk_group",
}  # fmt: skip
_DEEPSEEK_DEMANDS = _SILU | {"moe_layer_freq": 1}


def _read_deepseek(said: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    more = {
        "mla.q_rank": fields["mla.q_rank"] or 0,
        "moe.shared": fields["moe.mlp"] * said["n_shared_experts"],
    }
    if said.get("topk_method") == "greedy":
        return more | {"moe.groups": 1, "moe.group_top_k": 1}
    return more | {name: fields[name] or 1 for name in ("moe.groups", "moe.group_top_k")}


def _write_deepseek(m: ModelConfig) -> dict[str, Any]:
    return {
        "q_lora_rank": m.mla.q_rank or None,
        "n_shared_experts": m.moe.shared // m.moe.mlp,
        "num_key_value_heads": m.heads,
        "head_dim": m.mla.rope_dim,
    }


def _write_v2(m: ModelConfig) -> dict[str, Any]:
    return _write_deepseek(m) | {
        "topk_method": "greedy" if m.moe.groups == 1 else "group_limited_greedy"
    }


def _layer_types(m: ModelConfig) -> dict[str, Any]:
    """Every other layer sees all."""
    return {
        "layer_types": [f"{'sliding' if i % 2 == 0 else 'full'}_attention" for i in range(m.layers)]
    }


def _read_gpt_oss(said: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    types = said.get("layer_types")
    if types and types != [
        f"{'sliding' if i % 2 == 0 else 'full'}_attention" for i in range(len(types))
    ]:
        raise UserError(
            f"layer_types {types}: in gpt-oss every other layer has a window, the first does"
        )
    return {}


FAMILIES = (
    Family(
        "llama", "LlamaForCausalLM", _DENSE, _LLAMA_KEYS, _LEFT_OUT, {}, _SILU | {"mlp_bias": False},
    ),
    Family(
        "mistral", "MistralForCausalLM", _DENSE, _LLAMA_KEYS | {"window": "sliding_window"}, _LEFT_OUT, {},
        {"hidden_act": "silu"},
    ),
    Family(
        "qwen2", "Qwen2ForCausalLM", _DENSE, _LLAMA_KEYS, _LEFT_OUT, {"qkv_bias": True},
        {"hidden_act": "silu"} | _NO_WINDOW,
    ),
    Family(
        "qwen3", "Qwen3ForCausalLM", _DENSE, _LLAMA_KEYS, _LEFT_OUT, {"qk_norm": True}, _SILU | _NO_WINDOW,
    ),
    Family(
        "gpt2", "GPT2LMHeadModel", _GPT2_ENDS | _GPT2,
        {
            "vocab": "vocab_size", "embed": "n_embd", "layers": "n_layer", "heads": "n_head",
            "context": "n_positions", "norm_eps": "layer_norm_epsilon", "mlp": "n_inner",
            "tied": "tie_word_embeddings",
        },
        {"tie_word_embeddings": True, "n_inner": None},
        {
            "activation": "gelu", "norm": "layernorm", "positions": "learned", "qkv_bias": True, "bias": True,
        },
        {
            "activation_function": "gelu_new", "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
        },
        ignored=(r".*\.attn\.(bias|masked_bias)",), prefix="transformer.",
    ),
    Family(
        "mixtral", "MixtralForCausalLM", _ENDS | _NORMS | _ATTENTION | _MIXTRAL,
        _LLAMA_KEYS | _LOCAL | {"window": "sliding_window"}, _LEFT_OUT, {}, {"hidden_act": "silu"},
    ),
    Family(
        "qwen3_moe", "Qwen3MoeForCausalLM", _ENDS | _NORMS | _ATTENTION | _EXPERTS,
        _LLAMA_KEYS
        | _MOE
        | {"moe.experts": "num_experts|num_local_experts", "moe.normalize": "norm_topk_prob"},
        _LEFT_OUT | {"norm_topk_prob": False}, {"qk_norm": True},
        _SILU | _NO_WINDOW | {"decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    Family(
        "gpt_oss", "GptOssForCausalLM", _ENDS | _NORMS | _ATTENTION | _GPT_OSS,
        _LLAMA_KEYS | _LOCAL | {"window": "sliding_window"}, _LEFT_OUT,
        {
            "qkv_bias": True, "bias": True, "sinks": True, "full_every": 2, "moe.score": "topk_softmax",
            "moe.router_bias": True, "moe.bias": True, "moe.activation": "clamped_swiglu",
        },
        {"hidden_act": "silu", "attention_bias": True, "swiglu_limit": 7.0, "swiglu_alpha": 1.702},
        read=_read_gpt_oss, write=_layer_types,
    ),
    Family(
        "deepseek_v2", "DeepseekV2ForCausalLM", _ENDS | _DEEPSEEK_BLOCK, _DEEPSEEK_KEYS,
        _LEFT_OUT | {"n_group": 1, "topk_group": 1}, {},
        _DEEPSEEK_DEMANDS | {"norm_topk_prob": False, "scoring_func": "softmax"},
        read=_read_deepseek, write=_write_v2,
    ),
    Family(
        "deepseek_v3", "DeepseekV3ForCausalLM", _ENDS | _DEEPSEEK_BLOCK | _module(_DEEPSEEK_BLOCK),
        _DEEPSEEK_KEYS, _LEFT_OUT, {"moe.score": "sigmoid", "moe.bias_rate": 0.001},
        _DEEPSEEK_DEMANDS | {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_interleave": True},
        ignored=(r".*\.rotary_emb\.inv_freq", r"model\.layers\.{later}\..*"),
        read=_read_deepseek, write=_write_deepseek,
    ),
)  # fmt: skip
