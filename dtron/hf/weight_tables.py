"""Tables of weights: the place of each dtron weight in Hugging Face checkpoints.

A row is ``dtron's path: (Hugging Face's name, pattern)``; tensor_pattern.py describes the patterns.
``{l}`` is the number of a block and ``{e}`` the number of an expert. families.py combines these
tables into families.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Row(NamedTuple):
    """The place of one dtron weight in Hugging Face checkpoints.

    ``name``: the name of the tensor.
    ``pattern``: how the dims of the tensor map to the dims of the weight.
    ``paired``: the rotary columns (the last columns of the weight) are interleaved pairs in the
    tensor; see ``tensor_pattern.halves``.
    ``offset``: the weight minus the tensor. 1 for the norms of Gemma, which multiply by 1 + tensor:
    the weight in dtron is the whole factor.
    ``flipped``: the first dim of the weight is in reverse order there, as the taps of a convolution
    are."""

    name: str
    pattern: str
    paired: bool = False
    offset: float = 0.0
    flipped: bool = False


def block_rows(block: str, rows: Mapping[str, tuple]) -> dict[str, Row]:
    """Return rows with names relative to a block."""
    return {f"blocks.{{l}}.{path}": Row(block + row[0], *row[1:]) for path, row in rows.items()}


ENDS = {
    "embedding.w_tokens": Row("model.embed_tokens.weight", "v d -> v d"),
    "norm.scale": Row("model.norm.weight", "d -> d"),
    "w_head": Row("lm_head.weight", "v d -> v d"),
}
LAYER = "model.layers.{l}."
NORMS = block_rows(
    LAYER,
    {
        "norm_1.scale": ("input_layernorm.weight", "d -> d"),
        "norm_2.scale": ("post_attention_layernorm.weight", "d -> d"),
    },
)
ATTENTION = block_rows(
    LAYER,
    {
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
    },
)
OLMO_BLOCK = block_rows(
    LAYER,
    {
        "post_norm_1.scale": ("post_attention_layernorm.weight", "d -> d"),
        "post_norm_2.scale": ("post_feedforward_layernorm.weight", "d -> d"),
    },
)
GEMMA_NORMS = block_rows(
    LAYER,
    {
        "norm_1.scale": ("input_layernorm.weight", "d -> d"),
        "post_norm_1.scale": ("post_attention_layernorm.weight", "d -> d"),
        "norm_2.scale": ("pre_feedforward_layernorm.weight", "d -> d"),
        "post_norm_2.scale": ("post_feedforward_layernorm.weight", "d -> d"),
    },
)
QK_HEADS_NORM = block_rows(
    LAYER,
    {
        "attention.q_heads_norm.scale": ("self_attn.q_norm.weight", "(n h) -> n h"),
        "attention.k_heads_norm.scale": ("self_attn.k_norm.weight", "(k h) -> k h"),
    },
)
PHI3_BLOCK = block_rows(
    LAYER,
    {
        "attention.w_q": ("self_attn.qkv_proj.weight", "([n h] + k h + k h) d -> d n h"),
        "attention.w_k": ("self_attn.qkv_proj.weight", "(n h + [k h] + k h) d -> d k h"),
        "attention.w_v": ("self_attn.qkv_proj.weight", "(n h + k h + [k h]) d -> d k h"),
        "attention.w_o": ("self_attn.o_proj.weight", "d (n h) -> n h d"),
        "mlp.w_gate": ("mlp.gate_up_proj.weight", "(0/2 f) d -> d f"),
        "mlp.w_up": ("mlp.gate_up_proj.weight", "(1/2 f) d -> d f"),
        "mlp.w_down": ("mlp.down_proj.weight", "d f -> f d"),
    },
)
LATENT = block_rows(
    LAYER,
    {
        "mla.w_q_down": ("self_attn.q_a_proj.weight", "r d -> d r"),
        "mla.q_norm.scale": ("self_attn.q_a_layernorm.weight", "r -> r"),
        "mla.w_q_up": ("self_attn.q_b_proj.weight", "(n h) r -> r n h", True),
        "mla.w_q": ("self_attn.q_proj.weight", "(n h) d -> d n h", True),
        "mla.w_kv_down": ("self_attn.kv_a_proj_with_mqa.weight", "c d -> d c", True),
        "mla.kv_norm.scale": ("self_attn.kv_a_layernorm.weight", "r -> r"),
        "mla.w_kv_up": ("self_attn.kv_b_proj.weight", "(n c) r -> r n c"),
        "mla.w_o": ("self_attn.o_proj.weight", "d (n h) -> n h d"),
    },
)
INDEXER = block_rows(
    LAYER + "self_attn.indexer.",
    {
        "mla.indexer.w_q": ("wq_b.weight", "(n h) r -> r n h"),
        "mla.indexer.w_k": ("wk.weight", "h d -> d h"),
        "mla.indexer.k_scale": ("k_norm.weight", "h -> h"),
        "mla.indexer.k_bias": ("k_norm.bias", "h -> h"),
        "mla.indexer.w_heads": ("weights_proj.weight", "n d -> d n"),
    },
)
MLP = block_rows(
    LAYER,
    {
        "mlp.w_gate": ("mlp.gate_proj.weight", "f d -> d f"),
        "mlp.w_up": ("mlp.up_proj.weight", "f d -> d f"),
        "mlp.w_down": ("mlp.down_proj.weight", "d f -> f d"),
        "mlp.b_up": ("mlp.up_proj.bias", "f -> f"),
        "mlp.b_down": ("mlp.down_proj.bias", "d -> d"),
    },
)
MIXTRAL_EXPERTS = block_rows(
    LAYER + "block_sparse_moe.",
    {
        "moe.router.w": ("gate.weight", "e d -> d e"),
        "moe.experts.w_gate": ("experts.{e}.w1.weight", "f d -> e d f"),
        "moe.experts.w_up": ("experts.{e}.w3.weight", "f d -> e d f"),
        "moe.experts.w_down": ("experts.{e}.w2.weight", "d f -> e f d"),
    },
)
EXPERTS = block_rows(
    LAYER + "mlp.",
    {
        "moe.router.w": ("gate.weight", "e d -> d e"),
        "moe.router.balance": ("gate.e_score_correction_bias", "e -> e"),
        "moe.experts.w_gate": ("experts.{e}.gate_proj.weight", "f d -> e d f"),
        "moe.experts.w_up": ("experts.{e}.up_proj.weight", "f d -> e d f"),
        "moe.experts.w_down": ("experts.{e}.down_proj.weight", "d f -> e f d"),
        "moe.shared.w_gate": ("shared_experts.gate_proj.weight", "f d -> d f"),
        "moe.shared.w_up": ("shared_experts.up_proj.weight", "f d -> d f"),
        "moe.shared.w_down": ("shared_experts.down_proj.weight", "d f -> f d"),
    },
)
# transformers from version 5 has all experts in one tensor, and can save it so.
STACKED_EXPERTS = block_rows(
    LAYER + "mlp.experts.",
    {
        "moe.experts.w_gate": ("gate_up_proj", "e (0/2 f) d -> e d f"),
        "moe.experts.w_up": ("gate_up_proj", "e (1/2 f) d -> e d f"),
        "moe.experts.w_down": ("down_proj", "e d f -> e f d"),
    },
)
MIXTRAL_STACKED = STACKED_EXPERTS | block_rows(
    LAYER, {"moe.router.w": ("mlp.gate.weight", "e d -> d e")}
)
MINIMAX_EXPERTS = MIXTRAL_EXPERTS | block_rows(
    LAYER,
    {"moe.router.balance": ("block_sparse_moe.e_score_correction_bias", "e -> e")},
)
MINIMAX_STACKED = MIXTRAL_STACKED | block_rows(
    LAYER, {"moe.router.balance": ("mlp.e_score_correction_bias", "e -> e")}
)
GPT_OSS_EXPERTS = block_rows(
    LAYER + "mlp.",
    {
        "moe.router.w": ("router.weight", "e d -> d e"),
        "moe.router.b": ("router.bias", "e -> e"),
        "moe.experts.w_gate": ("experts.gate_up_proj", "e d (f 0/2) -> e d f"),
        "moe.experts.w_up": ("experts.gate_up_proj", "e d (f 1/2) -> e d f"),
        "moe.experts.w_down": ("experts.down_proj", "e f d -> e f d"),
        "moe.experts.b_gate": ("experts.gate_up_proj_bias", "e (f 0/2) -> e f"),
        "moe.experts.b_up": ("experts.gate_up_proj_bias", "e (f 1/2) -> e f"),
        "moe.experts.b_down": ("experts.down_proj_bias", "e d -> e d"),
    },
)
LLAMA4_BLOCK = block_rows(
    LAYER,
    {
        "attention.w_q": ("self_attn.q_proj.weight", "(n h) d -> d n h", True),
        "attention.w_k": ("self_attn.k_proj.weight", "(k h) d -> d k h", True),
        "attention.w_v": ("self_attn.v_proj.weight", "(k h) d -> d k h"),
        "attention.w_o": ("self_attn.o_proj.weight", "d (n h) -> n h d"),
        "mlp.w_gate": ("feed_forward.gate_proj.weight", "f d -> d f"),
        "mlp.w_up": ("feed_forward.up_proj.weight", "f d -> d f"),
        "mlp.w_down": ("feed_forward.down_proj.weight", "d f -> f d"),
        "moe.router.w": ("feed_forward.router.weight", "e d -> d e"),
        "moe.experts.w_gate": ("feed_forward.experts.gate_up_proj", "e d (0/2 f) -> e d f"),
        "moe.experts.w_up": ("feed_forward.experts.gate_up_proj", "e d (1/2 f) -> e d f"),
        "moe.experts.w_down": ("feed_forward.experts.down_proj", "e f d -> e f d"),
        "moe.shared.w_gate": ("feed_forward.shared_expert.gate_proj.weight", "f d -> d f"),
        "moe.shared.w_up": ("feed_forward.shared_expert.up_proj.weight", "f d -> d f"),
        "moe.shared.w_down": ("feed_forward.shared_expert.down_proj.weight", "d f -> f d"),
    },
)
GPT2_BLOCK = block_rows(
    "transformer.h.{l}.",
    {
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
    },
)
GPT2_ENDS = {
    "embedding.w_tokens": Row("transformer.wte.weight", "v d -> v d"),
    "embedding.w_positions": Row("transformer.wpe.weight", "s d -> s d"),
    "norm.scale": Row("transformer.ln_f.weight", "d -> d"),
    "norm.bias": Row("transformer.ln_f.bias", "d -> d"),
    "w_head": Row("lm_head.weight", "v d -> v d"),
}


_GATED = {
    "attention.w_q": ("self_attn.q_proj.weight", "(n 0/2 h) d -> d n h"),
    "attention.w_gate": ("self_attn.q_proj.weight", "(n 1/2 h) d -> d n h"),
}
GATED_ATTENTION = ATTENTION | block_rows(LAYER, _GATED)
SHARED_EXPERT = block_rows(
    LAYER + "mlp.",
    {
        "moe.shared.w_gate": ("shared_expert.gate_proj.weight", "f d -> d f"),
        "moe.shared.w_up": ("shared_expert.up_proj.weight", "f d -> d f"),
        "moe.shared.w_down": ("shared_expert.down_proj.weight", "d f -> f d"),
        "moe.w_shared": ("shared_expert_gate.weight", "0/1 d -> d"),
    },
)


def zero_centered(rows: Mapping[str, Row]) -> dict[str, Row]:
    """Return the rows of a model whose norms multiply by 1 + tensor (Gemma)."""
    return {path: row._replace(offset=1.0) if "norm" in path else row for path, row in rows.items()}


def mtp_module(rows: Mapping[str, Row]) -> dict[str, Row]:
    """Return the rows of multi-token prediction. Module k is saved as a block after the last block,
    with embedding and head again."""
    block = {f"mtp.{{l}}.block.{path[11:]}": row for path, row in rows.items()}
    return block | {
        "mtp.{l}.norm_h.scale": Row(LAYER + "hnorm.weight", "d -> d"),
        "mtp.{l}.norm_token.scale": Row(LAYER + "enorm.weight", "d -> d"),
        "mtp.{l}.w_token": Row(LAYER + "eh_proj.weight", "d (0/2 c) -> c d"),
        "mtp.{l}.w_h": Row(LAYER + "eh_proj.weight", "d (1/2 c) -> c d"),
        "mtp.{l}.norm.scale": Row(LAYER + "shared_head.norm.weight", "d -> d"),
    }
