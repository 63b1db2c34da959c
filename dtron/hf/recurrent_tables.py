"""Tables of the weights of mixers with a recurrent state; see weight_tables.py.

In patterns of a delta net, g is a head of keys, r a head of values that it serves, c the width of a
head of keys, and w the width of a head of values. In patterns of Mamba-2, i is a head, j its width,
u a group of heads, and s the width of B and C. t are the taps of the convolution, which are saved
in the order of the tokens.
"""

from __future__ import annotations

from dtron.hf.weight_tables import LAYER, Row, block_rows
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
