"""Tables of the weights of mixers with a recurrent state; see weight_tables.py.

In patterns of a delta net, g is a head of keys, r a head of values that it serves, c the width of a
head of keys, and w the width of a head of values. In patterns of Mamba-2, i is a head, j its width,
u a group of heads, and s the width of B and C. t are the taps of the convolution, which are saved
in the order of the tokens.
"""

from __future__ import annotations

from dtron.hf.weight_tables import LAYER, block_rows
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
