"""The model families, as tables: where each of our weights is in their checkpoints, and each of our sizes in
their config.json.

A row of weights is ``our path: (their name, how it lies)``, with the notation of pattern.py for the second.
``{l}`` is the number of a block and ``{e}`` that of an expert. A row of keys is ``our field: their key``. A
model belongs to a family if all that distinguishes it can be said in these tables; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Row(NamedTuple):
    """``paired``: the rotary columns, the last of ours, stand in pairs there, see ``pattern.halves``."""

    name: str
    lies: str
    paired: bool = False


@dataclass(frozen=True)
class Family:
    """``kind`` and ``architecture``: as config.json has them. ``keys``: our fields by theirs. ``defaults``: of
    keys that config.json may lack. ``fixed``: fields that all models of the family share. ``demands``: keys for
    which we compute one value only; one that is not there has it. ``ignored``: tensors that are no weights."""

    kind: str
    architecture: str
    weights: Mapping[str, Row]
    keys: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    demands: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
    prefix: str = "model."


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
})  # fmt: skip
_MLP = _rows(_LAYER, {
    "mlp.w_gate": ("mlp.gate_proj.weight", "f d -> d f"),
    "mlp.w_up": ("mlp.up_proj.weight", "f d -> d f"),
    "mlp.w_down": ("mlp.down_proj.weight", "d f -> f d"),
    "mlp.b_up": ("mlp.up_proj.bias", "f -> f"),
    "mlp.b_down": ("mlp.down_proj.bias", "d -> d"),
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
)  # fmt: skip
