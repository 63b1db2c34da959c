"""Gated delta net (Yang et al. 2024, arXiv:2412.06464): linear attention, as Qwen3-Next has it.

A token reads and writes a state of constant size, ``[K, V]`` for each head, instead of the keys and
values of all earlier tokens. So the work per token and the decoding cache do not grow with the
sequence. A model usually keeps full attention in every fourth block: ``--model.pattern LLLA``.

    q, k, v  =  silu(short convolution(x w_q, x w_k, x w_v)), with q and k of norm 1
    beta     =  sigmoid(x w_beta)
    log a    =  -exp(a_log) softplus(x w_decay + dt_bias)
    o        =  delta rule(q / sqrt(K), k, v, log a, beta)
    y        =  (norm(o) silu(x w_gate)) w_o

There may be more value heads than key heads: value head n reads and writes under the keys of key
head n // (value heads / key heads), as in Qwen3-Next.

Tensor parallelism shards both kinds of heads. The convolution, the gates, the recurrence and the
norm of the outputs stay within a head, so all of it is one local region between the two constrains
of any mixer. The norm's weight is shared by all heads. So each tp rank has one summand of its
gradient, and the region declares this sum (``Layout.local_map``). A trainer that forgets the sum is
wrong in exactly this weight. This bug has shipped.

Context parallelism needs contiguous shards: a rank's tokens are one run of the recurrence. The
layer receives two messages from other ranks, both of constant size. They are the last tokens of the
previous shard for the convolution (short_convolution.py), and the state at the start of the shard
(state_passing.py). Attention in the same model then has contiguous shards too.

``negative_eigenvalues`` doubles beta, to values up to 2 (Grazzi et al. 2024, arXiv:2411.12537). A
token's update of the state has the eigenvalue ``a (1 - beta)`` along its key, which may be negative
then. So a state can alternate from token to token. OLMo Hybrid has it.

Left out: a variant without the short convolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dtron.bounds import divides, from_to, nearest_divisor, under
from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.layers.context_parallel import Method
from dtron.layers.delta_net_core import HeadWeights, Projected, delta_net_core
from dtron.layers.linear import linear, linear_in
from dtron.layers.mixer import StageInputs
from dtron.layers.norm import Norm
from dtron.layers.recurrent_mixer import RecurrentInputs, RecurrentMixer
from dtron.layers.short_convolution import taps_init
from dtron.layers.state_passing import map_elements
from dtron.mesh import Layout
from dtron.params import Dims, WeightSpec, part, residual_out, weight


@dataclass(frozen=True)
class DeltaNetConfig:
    """Sizes of gated delta net, the mixer with the letter L."""

    key_heads: int = 4
    """heads of queries and keys"""
    value_heads: int = 8
    """heads of values, each with a state of its own"""
    key_dim: int = 32
    """width of a head's queries and keys"""
    value_dim: int = 32
    """width of a head's values"""
    taps: int = 4
    """tokens of the short convolution, counting the token itself"""
    chunk: int = 64
    """tokens that are computed at once; the results do not depend on it"""
    negative_eigenvalues: bool = False
    """beta is up to 2 instead of 1, so an update of the state may have a negative eigenvalue"""
    norm_eps: float | None = None
    """epsilon of the norm of the outputs; None: model.norm_eps"""

    def __post_init__(self) -> None:
        sizes = ("key_heads", "value_heads", "key_dim", "value_dim", "chunk")
        from_to(self, "model.delta", {**dict.fromkeys(sizes, (1, 1 << 20)), "taps": (2, 64)})
        if self.norm_eps is not None:
            under(self, "model.delta", {"norm_eps": float("inf")})
        if self.value_heads % self.key_heads:
            raise UserError(
                f"model.delta.value_heads={self.value_heads}, "
                f"model.delta.key_heads={self.key_heads}: key_heads must divide value_heads; use "
                f"--model.delta.key-heads {nearest_divisor(self.value_heads, self.key_heads)}"
            )

    def dims(self) -> dict[str, Any]:
        """Return sizes for the declaration of ``GatedDeltaNet``."""
        return {
            "key_heads": self.key_heads,
            "value_heads": self.value_heads,
            "qk_dim": self.key_dim,
            "v_dim": self.value_dim,
            "taps": self.taps,
            "layernorm": False,  # the norm of the outputs is RMSNorm in any model
        }

    @property
    def channels(self) -> int:
        """The number of channels of the convolution: all queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


def log_decay_rates(w: WeightSpec, dims: Dims, generator: torch.Generator) -> Tensor:
    """Draw ``a_log``: the logarithm of a number between 1 and 16, uniformly (Mamba-2,
    arXiv:2405.21060)."""
    x = torch.empty(w.shape, device=generator.device)
    return x.uniform_(1.0, 16.0, generator=generator).log()


def time_step_biases(w: WeightSpec, dims: Dims, generator: torch.Generator) -> Tensor:
    """Draw ``dt_bias``: softplus(dt_bias) is log-uniform between 0.001 and 0.1 (Mamba,
    arXiv:2312.00752, section 3.6). So the state is kept for many tokens at first."""
    x = torch.empty(w.shape, device=generator.device)
    dt = x.uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp()
    return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus


@dataclass(frozen=True)
class GatedDeltaNet:
    """The weights. ``taps_q[k]`` is multiplied with the token k places before."""

    segment: ClassVar[str] = "delta_net"

    w_q: Tensor = weight("embed", "key_heads", "qk_dim", summed=1)
    w_k: Tensor = weight("embed", "key_heads", "qk_dim", summed=1)
    w_v: Tensor = weight("embed", "value_heads", "v_dim", summed=1)
    w_gate: Tensor = weight("embed", "value_heads", "v_dim", summed=1)
    w_beta: Tensor = weight("embed", "value_heads", fan_in=1)
    w_decay: Tensor = weight("embed", "value_heads", fan_in=1)
    w_o: Tensor = weight("value_heads", "v_dim", "embed", summed=2, init=residual_out)
    taps_q: Tensor = weight("taps", "key_heads", "qk_dim", init=taps_init)
    taps_k: Tensor = weight("taps", "key_heads", "qk_dim", init=taps_init)
    taps_v: Tensor = weight("taps", "value_heads", "v_dim", init=taps_init)
    a_log: Tensor = weight("value_heads", init=log_decay_rates, decays=False)
    dt_bias: Tensor = weight("value_heads", init=time_step_biases, decays=False)
    norm: Norm = part(act_embed="v_dim")


def gated_delta_net(
    p: GatedDeltaNet, x_TD: Tensor, inputs: RecurrentInputs, layout: Layout
) -> Tensor:
    """Apply the layer: ``x_TD [T@tokens_sp, D]`` -> the same shape and placement."""
    x_TD = layout.constrain(x_TD, "tokens", "act_embed")  # all-gather over tp
    q, k, v, gate = (  # local
        linear(x_TD, w, recipe=inputs.recipe) for w in (p.w_q, p.w_k, p.w_v, p.w_gate)
    )
    projected = Projected(q, k, v, gate, linear(x_TD, p.w_beta), linear(x_TD, p.w_decay))
    y_TNH = delta_net_core(projected, head_weights(p), inputs, "silu", layout)  # sends over cp
    y_TD = linear_in(y_TNH, p.w_o, inputs.recipe)  # {+tp}: a sum still pending
    return layout.constrain(y_TD, "tokens_sp", "act_embed")  # reduce-scatter over tp


def head_weights(p: Any) -> HeadWeights:
    """Return the weights of a layer that its local region needs."""
    return HeadWeights(p.taps_q, p.taps_k, p.taps_v, p.a_log, p.dt_bias, p.norm.scale)


class GatedDeltaNetMixer(RecurrentMixer):
    """Gated delta net as a mixer."""

    params: ClassVar[type] = GatedDeltaNet
    widths: ClassVar[tuple[str, ...]] = ("delta.key_heads", "delta.value_heads")

    @property
    def config(self) -> DeltaNetConfig:
        return self.model.delta

    @property
    def norm_eps(self) -> float:
        own = self.config.norm_eps
        return self.model.norm_eps if own is None else own

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.config.value_heads, self.config.key_dim, self.config.value_dim

    def channels(self, tp: int) -> int:
        return self.config.channels // tp

    def dims(self) -> dict[str, Any]:
        return self.config.dims()

    def prepare(self, stage: StageInputs, layout: Layout) -> Mapping[int | None, RecurrentInputs]:
        inputs, largest = super().prepare(stage, layout), 1.0 + self.config.negative_eigenvalues
        return {window: replace(shared, largest_beta=largest) for window, shared in inputs.items()}

    def apply(self, p: Any, x_TD: Tensor, inputs: RecurrentInputs, layout: Layout) -> Tensor:
        return gated_delta_net(p, x_TD, inputs, layout)

    def flops(self, seq_len: int, window: int | None) -> float:
        """Return the FLOPs of the recurrence: three products of a token with the state, to read,
        write and read again, forward and backward. The chunked form does more."""
        c = self.config
        return 18.0 * c.value_heads * c.key_dim * c.value_dim

    def activation_bytes(self, mesh: MeshShape, tokens: int, element: int) -> int:
        """Return the bytes of the convolution's inputs and outputs, the gate and the layer's
        outputs; and in float32 those of the chunked form: queries, keys, values, U and W, the L x L
        matrices of a chunk, and the state and two maps for each chunk."""
        c, u = self.config, tokens // mesh.cp
        plain = 2 * c.channels + 2 * c.value_heads * c.value_dim
        in_chunk = 4 * c.key_dim + 3 * c.value_dim + 3 * c.chunk
        maps = 2 * c.key_dim * (c.key_dim + c.value_dim) + c.key_dim * c.value_dim
        wide = c.value_heads * (in_chunk + maps // c.chunk)
        return u * (element * plain + 4 * wide) // mesh.tp

    def message_bytes(self, mesh: MeshShape, tokens: int, method: Method, element: int) -> int:
        """Return the bytes of the maps of one row of all ranks, and of their gradients. They are in
        float32, and larger than the messages of the convolution."""
        c = self.config
        own = map_elements(1, c.value_heads // mesh.tp, c.key_dim, c.value_dim)
        return 8 * mesh.cp * own if mesh.cp > 1 else 0

    def check_mesh(self, mesh: MeshShape, seq_len: int, method: Method) -> None:
        for name in ("key_heads", "value_heads"):
            divides(f"model.delta.{name}", getattr(self.config, name), "tp", mesh.tp)
        super().check_mesh(mesh, seq_len, method)
