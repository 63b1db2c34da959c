"""Tables of the weights of mixers with a recurrent state; see weight_tables.py.

In patterns of a delta net, g is a head of keys, r a head of values that it serves, c the width of a
head of keys, and w the width of a head of values. In patterns of Mamba-2, i is a head, j its width,
u a group of heads, and s the width of B and C. t are the taps of the convolution, which are saved
in the order of the tokens.
"""

from __future__ import annotations

from typing import Any

from dtron.hf.weight_tables import (
    EXPERTS,
    LATENT,
    LAYER,
    MIXTRAL_EXPERTS,
    QK_HEADS_NORM,
    STACKED_EXPERTS,
    Row,
    block_rows,
)
from dtron.model.config import ModelConfig

# Qwen3-Next has the projections of a head of keys side by side.
FLIPPED = (False, 0.0, True)  # the last fields of ``Row``

QWEN3_DELTA_NET = block_rows(
    LAYER + "linear_attn.",
    {
        "delta_net.w_q": ("in_proj_qkvz.weight", "(g: [c] + c + r w + r w) d -> d g c"),
        "delta_net.w_k": ("in_proj_qkvz.weight", "(g: c + [c] + r w + r w) d -> d g c"),
        "delta_net.w_v": ("in_proj_qkvz.weight", "(g: c + c + [r w] + r w) d -> d (g r) w"),
        "delta_net.w_gate": ("in_proj_qkvz.weight", "(g: c + c + r w + [r w]) d -> d (g r) w"),
        "delta_net.w_beta": ("in_proj_ba.weight", "(g: [r] + r) d -> d (g r)"),
        "delta_net.w_decay": ("in_proj_ba.weight", "(g: r + [r]) d -> d (g r)"),
        "delta_net.w_o": ("out_proj.weight", "d (n w) -> n w d"),
        "delta_net.taps_q": ("conv1d.weight", "([g c] + g c + g r w) 0/1 t -> t g c", *FLIPPED),
        "delta_net.taps_k": ("conv1d.weight", "(g c + [g c] + g r w) 0/1 t -> t g c", *FLIPPED),
        "delta_net.taps_v": ("conv1d.weight", "(g c + g c + [g r w]) 0/1 t -> t (g r) w", *FLIPPED),
        "delta_net.a_log": ("A_log", "n -> n"),
        "delta_net.dt_bias": ("dt_bias", "n -> n"),
        "delta_net.norm.scale": ("norm.weight", "w -> w"),
    },
)
# Qwen3.5 has three kinds of projections in one tensor, and the others in tensors of their own.
QWEN3_5_DELTA_NET = QWEN3_DELTA_NET | block_rows(
    LAYER + "linear_attn.",
    {
        "delta_net.w_q": ("in_proj_qkv.weight", "([g c] + g c + g r w) d -> d g c"),
        "delta_net.w_k": ("in_proj_qkv.weight", "(g c + [g c] + g r w) d -> d g c"),
        "delta_net.w_v": ("in_proj_qkv.weight", "(g c + g c + [g r w]) d -> d (g r) w"),
        "delta_net.w_gate": ("in_proj_z.weight", "(n w) d -> d n w"),
        "delta_net.w_beta": ("in_proj_b.weight", "n d -> d n"),
        "delta_net.w_decay": ("in_proj_a.weight", "n d -> d n"),
    },
)
# OLMo Hybrid as it is published. transformers saves it so, too.
OLMO_HYBRID_BLOCK = (
    block_rows(
        LAYER,
        {
            "norm_1.scale": ("attention_layer_norm.weight", "d -> d"),
            "norm_2.scale": ("feedforward_layer_norm.weight", "d -> d"),
            "post_norm_1.scale": ("feedforward_layer_norm.weight", "d -> d"),
            "post_norm_2.scale": ("post_feedforward_layernorm.weight", "d -> d"),
        },
    )
    | QK_HEADS_NORM
    | block_rows(
        LAYER + "linear_attn.",
        {
            "delta_net.w_q": ("q_proj.weight", "(g c) d -> d g c"),
            "delta_net.w_k": ("k_proj.weight", "(g c) d -> d g c"),
            "delta_net.w_v": ("v_proj.weight", "(n w) d -> d n w"),
            "delta_net.w_gate": ("g_proj.weight", "(n w) d -> d n w"),
            "delta_net.w_beta": ("b_proj.weight", "n d -> d n"),
            "delta_net.w_decay": ("a_proj.weight", "n d -> d n"),
            "delta_net.w_o": ("o_proj.weight", "d (n w) -> n w d"),
            "delta_net.taps_q": ("q_conv1d.weight", "(g c) 0/1 t -> t g c", *FLIPPED),
            "delta_net.taps_k": ("k_conv1d.weight", "(g c) 0/1 t -> t g c", *FLIPPED),
            "delta_net.taps_v": ("v_conv1d.weight", "(n w) 0/1 t -> t n w", *FLIPPED),
            "delta_net.a_log": ("A_log", "n -> n"),
            "delta_net.dt_bias": ("dt_bias", "n -> n"),
            "delta_net.norm.scale": ("o_norm.weight", "w -> w"),
        },
    )
)
OLMO_HYBRID_STACKED = {path: row for path, row in QWEN3_DELTA_NET.items() if ".taps_" in path}
# In Kimi Linear, n is a head, a the width of the narrow vectors.
_KDA: dict[str, Any] = {
    "kimi_delta.w_q": ("q_proj.weight", "(n c) d -> d n c"),
    "kimi_delta.w_k": ("k_proj.weight", "(n c) d -> d n c"),
    "kimi_delta.w_v": ("v_proj.weight", "(n w) d -> d n w"),
    "kimi_delta.w_gate_down": ("g_a_proj.weight", "a d -> d a"),
    "kimi_delta.w_gate_up": ("g_b_proj.weight", "(n w) a -> a n w"),
    "kimi_delta.w_beta": ("b_proj.weight", "n d -> d n"),
    "kimi_delta.w_decay_down": ("f_a_proj.weight", "a d -> d a"),
    "kimi_delta.w_decay_up": ("f_b_proj.weight", "(n c) a -> a n c"),
    "kimi_delta.w_o": ("o_proj.weight", "d (n w) -> n w d"),
    "kimi_delta.taps_q": ("q_conv1d.weight", "(n c) 0/1 t -> t n c", *FLIPPED),
    "kimi_delta.taps_k": ("k_conv1d.weight", "(n c) 0/1 t -> t n c", *FLIPPED),
    "kimi_delta.taps_v": ("v_conv1d.weight", "(n w) 0/1 t -> t n w", *FLIPPED),
    "kimi_delta.a_log": ("A_log", "0/1 0/1 n 0/1 -> n"),
    "kimi_delta.dt_bias": ("dt_bias", "(n c) -> n c"),
    "kimi_delta.norm.scale": ("o_norm.weight", "w -> w"),
}
_KDA_STACKED = {
    "kimi_delta.taps_q": ("conv1d.weight", "([n c] + n c + n w) 0/1 t -> t n c", *FLIPPED),
    "kimi_delta.taps_k": ("conv1d.weight", "(n c + [n c] + n w) 0/1 t -> t n c", *FLIPPED),
    "kimi_delta.taps_v": ("conv1d.weight", "(n c + n c + [n w]) 0/1 t -> t n w", *FLIPPED),
} | {
    f"kimi_delta.{name}": ("forget_gate." + row[0], *row[1:])
    for name in ("w_decay_down", "w_decay_up", "a_log", "dt_bias")
    for row in [_KDA[f"kimi_delta.{name}"]]
}
_KIMI_MOE = {
    path.removeprefix("blocks.{l}."): (row.name.removeprefix(LAYER + "mlp."), row.pattern)
    for path, row in EXPERTS.items()
    if "experts.w_" not in path
}
KIMI_BLOCK = (
    block_rows(LAYER + "self_attn.", _KDA)
    | {path: row._replace(paired=False) for path, row in LATENT.items()}
    | MIXTRAL_EXPERTS
    | block_rows(LAYER + "block_sparse_moe.", _KIMI_MOE)
)
# As transformers has them in memory, and can save them.
KIMI_STACKED = (
    block_rows(LAYER + "self_attn.", _KDA_STACKED)
    | STACKED_EXPERTS
    | block_rows(LAYER + "mlp.", _KIMI_MOE)
)
_MAMBA = {
    "mamba.w_gate": ("in_proj.weight", "([i j] + i j + u s + u s + i) d -> d i j"),
    "mamba.w_x": ("in_proj.weight", "(i j + [i j] + u s + u s + i) d -> d i j"),
    "mamba.w_b": ("in_proj.weight", "(i j + i j + [u s] + u s + i) d -> d u s"),
    "mamba.w_c": ("in_proj.weight", "(i j + i j + u s + [u s] + i) d -> d u s"),
    "mamba.w_dt": ("in_proj.weight", "(i j + i j + u s + u s + [i]) d -> d i"),
    "mamba.w_o": ("out_proj.weight", "d (i j) -> i j d"),
    "mamba.taps_x": ("conv1d.weight", "([i j] + u s + u s) 0/1 t -> t i j", *FLIPPED),
    "mamba.taps_b": ("conv1d.weight", "(i j + [u s] + u s) 0/1 t -> t u s", *FLIPPED),
    "mamba.taps_c": ("conv1d.weight", "(i j + u s + [u s]) 0/1 t -> t u s", *FLIPPED),
    "mamba.bias_x": ("conv1d.bias", "([i j] + u s + u s) -> i j"),
    "mamba.bias_b": ("conv1d.bias", "(i j + [u s] + u s) -> u s"),
    "mamba.bias_c": ("conv1d.bias", "(i j + u s + [u s]) -> u s"),
    "mamba.a_log": ("A_log", "i -> i"),
    "mamba.dt_bias": ("dt_bias", "i -> i"),
    "mamba.skip": ("D", "i -> i"),
    "mamba.norm.scale": ("norm.weight", "(i j) -> i j"),
}
NEMOTRON_H_ENDS = {
    "embedding.w_tokens": Row("backbone.embeddings.weight", "v d -> v d"),
    "norm.scale": Row("backbone.norm_f.weight", "d -> d"),
    "w_head": Row("lm_head.weight", "v d -> v d"),
}
NEMOTRON_H_LAYER = "backbone.layers.{l}."
NEMOTRON_H_BLOCK = block_rows(
    NEMOTRON_H_LAYER,
    {"norm_1.scale": ("norm.weight", "d -> d"), "norm_2.scale": ("norm.weight", "d -> d")},
) | block_rows(
    NEMOTRON_H_LAYER + "mixer.",
    {
        **_MAMBA,
        "attention.w_q": ("q_proj.weight", "(n h) d -> d n h"),
        "attention.w_k": ("k_proj.weight", "(k h) d -> d k h"),
        "attention.w_v": ("v_proj.weight", "(k h) d -> d k h"),
        "attention.w_o": ("o_proj.weight", "d (n h) -> n h d"),
        "mlp.w_up": ("up_proj.weight", "f d -> d f"),
        "mlp.w_down": ("down_proj.weight", "d f -> f d"),
    },
)


def axis_sizes(m: ModelConfig) -> dict[str, int]:
    """Return the sizes of these axes."""
    delta, mamba = m.delta, m.mamba
    return {
        "g": delta.key_heads,
        "r": delta.value_heads // delta.key_heads,
        "c": delta.key_dim,
        "w": delta.value_dim,
        "i": mamba.heads,
        "j": mamba.head_dim,
        "u": mamba.groups,
        "s": mamba.state,
    }
