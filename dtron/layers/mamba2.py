"""Mamba-2 (Dao & Gu 2024, arXiv:2405.21060): a state space model, as Nemotron-H has it
(arXiv:2504.03624).

A token reads and writes a state of constant size, as in gated_delta_net.py. The paper's names are
x, B, C and dt:

    x, B, C  =  silu(short convolution(h w_x, h w_b, h w_c) + biases)
    dt       =  max(softplus(h w_dt + dt_bias), time_step_min)
    log a    =  -exp(a_log) dt
    o        =  SSD(queries C, keys B, values dt x, log a)        ssd.py
    y        =  norm_g((o + skip x) silu(h w_gate)) w_o

B and C are shared by groups of heads: a group is a head of keys in gated_delta_net.py, and a head
of x is a head of values. norm_g is an RMSNorm of all channels of a group together; its weight has a
number for each channel.

**Tensor parallelism** shards the heads. If there are several groups, tp must divide their number:
a rank has whole groups, and all between the projections is local. With one group each rank computes
B and C for itself (``act_key_heads``), and declares their gradients as sums over tp. The norm of
the one group then needs one all-reduce of a number per token.

**Context parallelism** is the one of gated_delta_net.py. The map of a shard is smaller: its
transition is a number instead of a matrix.

Left out: a norm before the gate, dt with an upper limit, and the layer without the bias of the
convolution. No published model that dtron reads has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dtron.bounds import divides, from_to, nearest_divisor, under
from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.layers.context_parallel import Method
from dtron.layers.gated_delta_net import log_decay_rates, time_step_biases
from dtron.layers.linear import linear, linear_in
from dtron.layers.norm import HeadsNorm, norm_in_groups
from dtron.layers.recurrent_mixer import (
    REGION_AXES,
    Past,
    RecurrentInputs,
    RecurrentMixer,
    by_rows,
    convolved,
    document_starts,
    padding,
    sequence_ranks,
)
from dtron.layers.short_convolution import taps_init
from dtron.layers.ssd import SSDTokens, ssd
from dtron.layers.state_passing import map_elements
from dtron.mesh import Layout
from dtron.params import ones, part, residual_out, weight, zeros


@dataclass(frozen=True)
class Mamba2Config:
    """Sizes of Mamba-2, the mixer with the letter S."""

    heads: int = 16
    """heads, each with a state of its own"""
    head_dim: int = 32
    """width of a head"""
    groups: int = 1
    """groups of heads that share B and C"""
    state: int = 32
    """rows of a state: the width of B and C"""
    taps: int = 4
    """tokens of the short convolution, counting the token itself"""
    chunk: int = 64
    """tokens that are computed at once; the results do not depend on it"""
    time_step_min: float = 0.0
    """the least time step"""

    def __post_init__(self) -> None:
        sizes = ("heads", "head_dim", "groups", "state", "chunk")
        from_to(self, "model.mamba", {**dict.fromkeys(sizes, (1, 1 << 20)), "taps": (2, 64)})
        under(self, "model.mamba", {"time_step_min": float("inf")})
        if self.heads % self.groups:
            raise UserError(
                f"model.mamba.heads={self.heads}, model.mamba.groups={self.groups}: groups must "
                f"divide heads; use --model.mamba.groups {nearest_divisor(self.heads, self.groups)}"
            )

    def dims(self) -> dict[str, Any]:
        """Return sizes for the declaration of ``Mamba2``."""
        return {
            "key_heads": self.groups,
            "value_heads": self.heads,
            "qk_dim": self.state,
            "v_dim": self.head_dim,
            "taps": self.taps,
        }


@dataclass(frozen=True)
class Mamba2:
    """The weights. ``taps_x[k]`` is multiplied with the token k places before."""

    segment: ClassVar[str] = "mamba"

    w_x: Tensor = weight("embed", "value_heads", "v_dim", summed=1)
    w_b: Tensor = weight("embed", "key_heads", "qk_dim", summed=1)
    w_c: Tensor = weight("embed", "key_heads", "qk_dim", summed=1)
    w_gate: Tensor = weight("embed", "value_heads", "v_dim", summed=1)
    w_dt: Tensor = weight("embed", "value_heads", fan_in=1)
    w_o: Tensor = weight("value_heads", "v_dim", "embed", summed=2, init=residual_out)
    taps_x: Tensor = weight("taps", "value_heads", "v_dim", init=taps_init)
    taps_b: Tensor = weight("taps", "key_heads", "qk_dim", init=taps_init)
    taps_c: Tensor = weight("taps", "key_heads", "qk_dim", init=taps_init)
    bias_x: Tensor = weight("value_heads", "v_dim", init=zeros)
    bias_b: Tensor = weight("key_heads", "qk_dim", init=zeros)
    bias_c: Tensor = weight("key_heads", "qk_dim", init=zeros)
    a_log: Tensor = weight("value_heads", init=log_decay_rates, decays=False)
    dt_bias: Tensor = weight("value_heads", init=time_step_biases, decays=False)
    skip: Tensor = weight("value_heads", init=ones)
    norm: HeadsNorm = part(heads="value_heads", head_dim="v_dim")


@dataclass(frozen=True)
class OneGroupMamba2(Mamba2):
    """The weights of a layer with one group. Each tp rank has those of B and C whole."""

    w_b: Tensor = weight("embed", "act_key_heads", "qk_dim", summed=1)
    w_c: Tensor = weight("embed", "act_key_heads", "qk_dim", summed=1)
    taps_b: Tensor = weight("taps", "act_key_heads", "qk_dim", init=taps_init)
    taps_c: Tensor = weight("taps", "act_key_heads", "qk_dim", init=taps_init)
    bias_b: Tensor = weight("act_key_heads", "qk_dim", init=zeros)
    bias_c: Tensor = weight("act_key_heads", "qk_dim", init=zeros)


class _Tensors(NamedTuple):
    """The projections of the tokens, and the weights that the local region needs."""

    x_TNH: Tensor
    b_TGK: Tensor
    c_TGK: Tensor
    gate_TNH: Tensor
    dt_TN: Tensor
    taps_x: Tensor
    taps_b: Tensor
    taps_c: Tensor
    bias_x: Tensor
    bias_b: Tensor
    bias_c: Tensor
    a_log: Tensor
    dt_bias: Tensor
    skip: Tensor


def mamba2(
    p: Mamba2, x_TD: Tensor, inputs: RecurrentInputs, c: Mamba2Config, layout: Layout
) -> Tensor:
    """Apply the layer: ``x_TD [T@tokens_sp, D]`` -> the same shape and placement."""
    x_TD = layout.constrain(x_TD, "tokens", "act_embed")  # all-gather over tp
    x, b, c_TGK, gate = (  # local
        linear(x_TD, w, recipe=inputs.recipe) for w in (p.w_x, p.w_b, p.w_c, p.w_gate)
    )
    group = "key_heads" if c.groups > 1 else "act_key_heads"
    heads, groups = ("value_heads", None), (group, None)
    ins: list[tuple[str | None, ...]] = [
        *(("tokens", *axes) for axes in (heads, groups, groups, heads, heads[:1])),
        *(("taps", *axes) for axes in (heads, groups, groups)),
        *(heads, groups, groups, heads[:1], heads[:1], heads[:1]),
    ]
    tensors = _Tensors(
        *(x, b, c_TGK, gate, linear(x_TD, p.w_dt), p.taps_x, p.taps_b, p.taps_c),
        *(p.bias_x, p.bias_b, p.bias_c, p.a_log, p.dt_bias, p.skip),
    )
    core = partial(_on_rank, inputs=inputs, least=c.time_step_min, layout=layout)
    region = layout.local_map(core, ins + REGION_AXES, ("tokens", *heads))  # sends over cp
    y_TNH = region(*tensors, *inputs.region_inputs())
    y_TNH = norm_in_groups(p.norm, y_TNH, c.groups, group, inputs.eps, layout).to(x.dtype)
    y_TD = linear_in(y_TNH, p.w_o, inputs.recipe)  # {+tp}: a sum still pending
    return layout.constrain(y_TD, "tokens_sp", "act_embed")  # reduce-scatter over tp


def _on_rank(*tensors: Any, inputs: RecurrentInputs, least: float, layout: Layout) -> Tensor:
    """Compute the gated outputs ``[T, N, V]``, in float32 at least, for a rank's own tokens and
    heads.

    ``tensors``: the fields of ``_Tensors``, then ``sees_TK`` and ``Past``."""
    t, sees_TK, past = _Tensors(*tensors[:14]), tensors[14], Past(*tensors[15:])
    parts, seq_len = (t.x_TNH, t.b_TGK, t.c_TGK), inputs.seq_len
    taps, biases = (t.taps_x, t.taps_b, t.taps_c), (t.bias_x, t.bias_b, t.bias_c)
    x, b, c = convolved(parts, taps, biases, sees_TK, past, inputs, layout)
    dtype = torch.promote_types(x.dtype, torch.float32)
    x = x.to(dtype)
    dt = F.softplus(by_rows(t.dt_TN, seq_len).to(dtype) + t.dt_bias.to(dtype)).clamp(min=least)
    unused = padding(past, seq_len)
    if unused is not None:  # padding does not change the state
        dt = dt.masked_fill(unused[..., None], 0.0)
    log_decay, starts = -t.a_log.to(dtype).exp() * dt, document_starts(sees_TK, past, seq_len)
    tokens = SSDTokens(c, b, dt[..., None] * x, log_decay, starts)
    o, state = ssd(tokens, past.state_BNKV, inputs.chunk, sequence_ranks(inputs, past, layout))
    if past.state_BNKV is not None:
        past.state_BNKV.copy_(state)
    y = o + t.skip.to(dtype)[:, None] * x
    return y.flatten(0, 1) * F.silu(t.gate_TNH.to(dtype))


class Mamba2Mixer(RecurrentMixer):
    """Mamba-2 as a mixer."""

    widths: ClassVar[tuple[str, ...]] = ("mamba.heads",)

    @property
    def params(self) -> type:
        return OneGroupMamba2 if self.config.groups == 1 else Mamba2

    @property
    def config(self) -> Mamba2Config:
        return self.model.mamba

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.config.heads, self.config.state, self.config.head_dim

    def channels(self, tp: int) -> int:
        c = self.config
        return c.heads * c.head_dim // tp + 2 * max(1, c.groups // tp) * c.state

    def dims(self) -> dict[str, Any]:
        return self.config.dims()

    def apply(self, p: Any, x_TD: Tensor, inputs: RecurrentInputs, layout: Layout) -> Tensor:
        return mamba2(p, x_TD, inputs, self.config, layout)

    def flops(self, seq_len: int, window: int | None) -> float:
        """Return the FLOPs of the recurrence: two products of a token with the state, to write and
        to read, forward and backward. The chunked form does more."""
        c = self.config
        return 12.0 * c.heads * c.state * c.head_dim

    def activation_bytes(self, mesh: MeshShape, tokens: int, element: int) -> int:
        """Return the bytes of the convolution's inputs and outputs, the gate and the layer's
        outputs; and in float32 those of the chunked form: values, outputs, the L x L matrices of a
        chunk, and the state and the map for each chunk."""
        c, u = self.config, tokens // mesh.cp
        width = c.heads * c.head_dim // mesh.tp
        plain = 2 * self.channels(mesh.tp) + 2 * width
        matrices = c.heads // mesh.tp * (3 * c.chunk + 3 * c.state * c.head_dim // c.chunk)
        return u * (element * plain + 4 * (5 * width + matrices))

    def message_bytes(self, mesh: MeshShape, tokens: int, method: Method, element: int) -> int:
        """Return the bytes of the maps of one row of all ranks, and of their gradients. They are in
        float32, and larger than the messages of the convolution."""
        heads, key_dim, value_dim = self.state_shape
        own = map_elements(1, heads // mesh.tp, key_dim, value_dim, scalar=True)
        return 8 * mesh.cp * own if mesh.cp > 1 else 0

    def check_mesh(self, mesh: MeshShape, seq_len: int, method: Method) -> None:
        divides("model.mamba.heads", self.config.heads, "tp", mesh.tp)
        if self.config.groups > 1:
            divides("model.mamba.groups", self.config.groups, "tp", mesh.tp)
        super().check_mesh(mesh, seq_len, method)
