"""Kimi delta attention (Kimi Linear, arXiv:2510.26692): a gated delta net whose channels forget by
themselves.

It differs from gated_delta_net.py in two gates. Each channel of the keys has its own decay, and the
output gate is a sigmoid. Both gates have as many values as a projection of a full width, so they
are made from a narrow vector each, of the width of a value head:

    log a  =  -exp(a_log) softplus(x w_decay_down w_decay_up + dt_bias)      for each channel
    y      =  (norm(o) sigmoid(x w_gate_down w_gate_up)) w_o

Over tp each rank repeats the two narrow projections, and makes the gates of its own heads from
them. Everything else is shared with gated delta net: the config ``--model.delta``, the rule, the
states over cp, the decoding cache. ``--model.pattern KKKA`` is the pattern of Kimi Linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dtron.distributed.mesh_shape import MeshShape
from dtron.layers.delta_net_core import Projected, delta_net_core
from dtron.layers.delta_rule import BLOCK
from dtron.layers.gated_delta_net import (
    GatedDeltaNetMixer,
    head_weights,
    log_decay_rates,
    time_step_biases,
)
from dtron.layers.linear import linear, linear_in
from dtron.layers.norm import Norm
from dtron.layers.recurrent_mixer import RecurrentInputs
from dtron.layers.short_convolution import taps_init
from dtron.mesh import Layout
from dtron.params import part, residual_out, weight


@dataclass(frozen=True)
class KimiDelta:
    """The weights. ``act_gate_rank`` and ``gate_rank`` differ as ``act_embed`` and ``embed`` do:
    ZeRO may shard ``gate_rank``."""

    segment: ClassVar[str] = "kimi_delta"

    w_q: Tensor = weight("embed", "key_heads", "qk_dim", summed=1)
    w_k: Tensor = weight("embed", "key_heads", "qk_dim", summed=1)
    w_v: Tensor = weight("embed", "value_heads", "v_dim", summed=1)
    w_gate_down: Tensor = weight("embed", "act_gate_rank", summed=1)
    w_gate_up: Tensor = weight("gate_rank", "value_heads", "v_dim", summed=1)
    w_beta: Tensor = weight("embed", "value_heads", fan_in=1)
    w_decay_down: Tensor = weight("embed", "act_gate_rank", summed=1)
    w_decay_up: Tensor = weight("gate_rank", "value_heads", "qk_dim", summed=1)
    w_o: Tensor = weight("value_heads", "v_dim", "embed", summed=2, init=residual_out)
    taps_q: Tensor = weight("taps", "key_heads", "qk_dim", init=taps_init)
    taps_k: Tensor = weight("taps", "key_heads", "qk_dim", init=taps_init)
    taps_v: Tensor = weight("taps", "value_heads", "v_dim", init=taps_init)
    a_log: Tensor = weight("value_heads", init=log_decay_rates, decays=False)
    dt_bias: Tensor = weight("value_heads", "qk_dim", init=time_step_biases, decays=False)
    norm: Norm = part(act_embed="v_dim")


def kimi_delta(p: KimiDelta, x_TD: Tensor, inputs: RecurrentInputs, layout: Layout) -> Tensor:
    """Apply the layer: ``x_TD [T@tokens_sp, D]`` -> the same shape and placement."""
    recipe = inputs.recipe
    x_TD = layout.constrain(x_TD, "tokens", "act_embed")  # all-gather over tp
    q_TNH, k_TNH, v_TNH = (linear(x_TD, w, recipe=recipe) for w in (p.w_q, p.w_k, p.w_v))  # local
    gate_TNH, decay_TNH = (
        linear(linear(x_TD, down, recipe=recipe), up, recipe=recipe)
        for down, up in ((p.w_gate_down, p.w_gate_up), (p.w_decay_down, p.w_decay_up))
    )
    beta_TN = linear(x_TD, p.w_beta)
    projected = Projected(q_TNH, k_TNH, v_TNH, gate_TNH, beta_TN, decay_TNH)
    y_TNH = delta_net_core(projected, head_weights(p), inputs, "sigmoid", layout)  # sends over cp
    y_TD = linear_in(y_TNH, p.w_o, recipe)  # {+tp}: a sum still pending
    return layout.constrain(y_TD, "tokens_sp", "act_embed")  # reduce-scatter over tp


class KimiDeltaMixer(GatedDeltaNetMixer):
    """Kimi delta attention as a mixer."""

    params: ClassVar[type] = KimiDelta

    def dims(self) -> dict[str, Any]:
        return self.config.dims() | {"gate_rank": self.config.value_dim}

    def apply(self, p: Any, x_TD: Tensor, inputs: RecurrentInputs, layout: Layout) -> Tensor:
        return kimi_delta(p, x_TD, inputs, layout)

    def activation_bytes(self, mesh: MeshShape, tokens: int, element: int) -> int:
        """Return also the bytes of the decays, and of the quotients of decays in the blocks on the
        diagonal of a chunk."""
        c, u = self.config, tokens // mesh.cp
        decays = c.value_heads * c.key_dim * (2 + 2 * min(BLOCK, c.chunk))
        return super().activation_bytes(mesh, tokens, element) + 4 * u * decays // mesh.tp
