"""Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).

Tensor parallelism shards the heads. Each rank projects, rotates and attends with its own heads, and
only ``w_o`` needs the other heads (Shoeybi et al. 2019, arXiv:1909.08053, figure 3b). The core is a
local region (attention_core.py): each rank unflattens the tokens of its own heads to
``[B, S, N, H]``. attention_kernels.py selects the kernels. If cp shards the sequences,
context_parallel.py does the communication; otherwise the core communicates nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from dtron.bounds import divides, nearest_divisor
from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.layers.attention_core import LARGEST, AttentionInputs, Heads, core, largest
from dtron.layers.attention_kernels import LEAST_HEAD_DIM, AttentionPath
from dtron.layers.attention_mask import AttentionMask
from dtron.layers.context_parallel import Method, RowSharding, prepare
from dtron.layers.kv_cache import KVCache, Past, empty_kv_cache, past_axes
from dtron.layers.linear import linear, linear_in
from dtron.layers.mixer import Mixer, StageInputs
from dtron.layers.norm import HeadsNorm, Norm, norm, norm_over_heads
from dtron.layers.rope import RopeConfig, rope_tables, rotate
from dtron.layers.token_order import TokenOrder
from dtron.mesh import Layout
from dtron.params import part, residual_out, weight, zeros


@dataclass(frozen=True)
class Attention:
    """The weights. ``sinks`` are learned scores, see attention_kernels.py. ``w_gate`` makes a gate
    for each channel of the outputs (Qiu et al. 2025, arXiv:2505.06708)."""

    segment: ClassVar[str] = "attention"

    w_q: Tensor = weight("embed", "heads", "head_dim", summed=1)
    w_gate: Tensor | None = weight("embed", "heads", "head_dim", summed=1, when="attention_gate")
    w_k: Tensor = weight("embed", "kv_heads", "head_dim", summed=1)
    w_v: Tensor = weight("embed", "kv_heads", "head_dim", summed=1)
    w_o: Tensor = weight("heads", "head_dim", "embed", summed=2, init=residual_out)
    b_q: Tensor | None = weight("heads", "head_dim", init=zeros, when="qkv_bias")
    b_k: Tensor | None = weight("kv_heads", "head_dim", init=zeros, when="qkv_bias")
    b_v: Tensor | None = weight("kv_heads", "head_dim", init=zeros, when="qkv_bias")
    b_o: Tensor | None = weight("act_embed", init=zeros, when="bias")
    sinks: Tensor | None = weight("heads", init=zeros, when="sinks")
    q_norm: Norm | None = part(when="qk_norm", act_embed="head_dim")
    k_norm: Norm | None = part(when="qk_norm", act_embed="head_dim")
    q_heads_norm: HeadsNorm | None = part(when="qk_heads_norm")
    k_heads_norm: HeadsNorm | None = part(when="qk_heads_norm", heads="kv_heads")


def attention(p: Attention, x_TD: Tensor, inputs: AttentionInputs, layout: Layout) -> Tensor:
    """Apply the layer: ``x_TD [T@tokens_sp, D]`` -> the same shape and placement."""
    return attention_outputs(p, x_TD, inputs, layout, logits=False)[0]


def attention_outputs(
    p: Attention, x_TD: Tensor, inputs: AttentionInputs, layout: Layout, logits: bool
) -> tuple[Tensor, ...]:
    """Return the result of ``attention``, and with ``logits`` also the largest logit of each head:
    ``[N@heads]``, a pending maximum over tokens."""
    recipe = inputs.recipe
    x_TD = layout.constrain(x_TD, "tokens", "act_embed")  # all-gather over tp
    q_TNH = linear(x_TD, p.w_q, p.b_q, recipe)  # local, like the next lines
    k_TKH = linear(x_TD, p.w_k, p.b_k, recipe)
    v_TKH = linear(x_TD, p.w_v, p.b_v, recipe)
    if p.q_norm is not None and p.k_norm is not None:
        q_TNH = norm(p.q_norm, q_TNH, inputs.eps)
        k_TKH = norm(p.k_norm, k_TKH, inputs.eps)
    if p.q_heads_norm is not None and p.k_heads_norm is not None:
        q_TNH = norm_over_heads(p.q_heads_norm, q_TNH, inputs.eps, layout)
        k_TKH = norm_over_heads(p.k_heads_norm, k_TKH, inputs.eps, layout)
    q, kv = ("tokens", "heads", None), ("tokens", "kv_heads", None)
    ins = (q, kv, kv, ("tokens", None), ("rows",), ("heads",), *past_axes("kv_heads"))

    def on_rank(
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        table_TH: Tensor | None,
        documents_T: Tensor | None,
        sinks_N: Tensor | None,
        *past: Tensor | None,
    ) -> tuple[Tensor, ...]:
        if table_TH is not None:
            q_TNH, k_TKH = rotate(q_TNH, table_TH), rotate(k_TKH, table_TH)
        heads = Heads(q_TNH, k_TKH, v_TKH)
        o_TNH = core(heads, documents_T, sinks_N, Past(*past), inputs, layout)
        return (o_TNH, largest(heads, documents_T, inputs, layout)) if logits else (o_TNH,)

    # Communication over cp: see context_parallel.py.
    o_TNH, *largest_N = layout.local_map(on_rank, ins, [q, LARGEST] if logits else [q])(
        q_TNH, k_TKH, v_TKH, inputs.table_TH, inputs.documents_T, p.sinks, *inputs.past
    )
    if p.w_gate is not None:
        o_TNH = o_TNH * linear(x_TD, p.w_gate, recipe=recipe).sigmoid()
    y_TD = linear_in(o_TNH, p.w_o, recipe)  # {+tp}: a sum still pending
    y_TD = layout.constrain(y_TD, "tokens_sp", "act_embed")  # reduce-scatter over tp
    return y_TD if p.b_o is None else y_TD + p.b_o, *largest_N


class AttentionMixer(Mixer):
    """Grouped-query attention as a mixer. A logical axis of heads and the number of its heads in
    the model's config have the same name.

    ``kv_axis``: the logical axis of the heads of keys and values.
    ``width_name``: the text before the width of a head in an error message."""

    params: ClassVar[type] = Attention
    has_logits: ClassVar[bool] = True
    paged: ClassVar[bool] = True
    kv_axis: ClassVar[str] = "kv_heads"
    width_name: ClassVar[str] = "model.head_dim="

    @property
    def kv_heads(self) -> int:
        return getattr(self.model, self.kv_axis)

    @property
    def head_dims(self) -> tuple[int, int]:
        """The width of a head's queries and keys, and the width of its values."""
        return self.model.head_dim, self.model.head_dim

    @property
    def rotary_dim(self) -> int:
        return int(self.model.head_dim * self.model.rope.partial)

    def rope(self, window: int | None) -> RopeConfig | None:
        """Return the rotation in layers with this window; None: no rotation."""
        m = self.model
        if m.positions != "rotary" or window is None or m.window_rope_theta is None:
            return m.rope if m.positions == "rotary" else None
        return RopeConfig(m.window_rope_theta, partial=m.rope.partial)

    def score_scale(self, rope: RopeConfig | None) -> float | None:
        """Return the factor on attention scores; None: 1 / sqrt(head_dim)."""
        own, factor = self.model.attention_scale, self.score_growth
        factor *= 1.0 if rope is None else rope.temperature
        if factor == 1 and own is None:
            return None
        return factor * (self.head_dims[0] ** -0.5 if own is None else own)

    @property
    def score_growth(self) -> float:
        """In all, scores have the factor 1 / head_dim. A given ``attention_scale`` is the same at
        all widths, and 1 / sqrt(head_dim) is not."""
        base, width = self.model.mup_base_head_dim, self.head_dims[0]
        if not base:
            return 1.0
        return (base / width) ** (0.5 if self.model.attention_scale is None else 1.0)

    @property
    def query_weights(self) -> tuple[str, ...]:
        if self.model.qk_norm:
            return "q_norm.scale", "q_norm.bias", "q_heads_norm.scale"
        return "w_q", "b_q"

    def apply(self, p: Any, x_TD: Tensor, inputs: AttentionInputs, layout: Layout) -> Tensor:
        return attention(p, x_TD, inputs, layout)

    def apply_with_logits(
        self, p: Any, x_TD: Tensor, inputs: AttentionInputs, layout: Layout
    ) -> tuple[Tensor, ...]:
        return attention_outputs(p, x_TD, inputs, layout, logits=True)

    def logit_factors(self, p: Any, factor_N: Tensor) -> dict[str, Tensor]:
        """A key head is shared by a group of query heads. It takes the root of the factor that
        all of its group need, and the queries take the rest. So no weight grows, and a head with
        factor 1 keeps its queries and its keys. (A group of one: equation of section 2.1.2 with
        alpha = 1/2.)"""
        shared_K = factor_N.unflatten(0, (self.model.kv_heads, -1)).amax(1).sqrt()
        own_N = factor_N / shared_K.repeat_interleave(len(factor_N) // len(shared_K))
        pairs = (p.w_q, own_N), (p.b_q, own_N), (p.w_k, shared_K), (p.b_k, shared_K)
        return {w.path: factor[:, None] for w, factor in pairs if w is not None}

    def prepare(self, stage: StageInputs, layout: Layout) -> dict[int | None, AttentionInputs]:
        """Make a mask and the rotary angles for each window."""
        m, batch = self.model, stage.batch
        tables: dict[RopeConfig | None, Tensor | None] = {None: None}
        inputs = {}
        for window in stage.windows:
            rope = self.rope(window)
            if rope is not None and rope not in tables:
                make = partial(rope_tables, rope, head_dim=self.rotary_dim, dtype=stage.x_TD.dtype)
                in_region = layout.local_map(make, (("tokens",),), ("tokens", None))
                tables[rope] = in_region(batch.positions_T)
            mask, path = prepare(
                AttentionMask(batch.seq_len, window, m.softcap, self.score_scale(rope)),
                batch.documents_T,
                m.sinks,
                self.head_dims,
                stage.x_TD,
                layout,
                stage.kernel,
                RowSharding(stage.cp_method, batch.zigzag),
            )
            inputs[window] = AttentionInputs(
                documents_T=batch.documents_T,
                mask=mask,
                table_TH=tables[rope],
                path=path,
                positions_T=batch.positions_T,
            )
        return inputs

    def empty_cache(
        self, rows: int, slots: int, layout: Layout, dtype: torch.dtype, device: str
    ) -> KVCache:
        return empty_kv_cache(
            rows, slots, self.kv_heads, self.head_dims, self.kv_axis, layout, dtype, device
        )

    def orders(self, method: Method) -> tuple[TokenOrder, ...]:
        """Prefer zig-zag: all ranks have the same work, as they have under ulysses in any order."""
        return ("contiguous", "zigzag") if method == "ulysses" else ("zigzag", "contiguous")

    def flops(self, seq_len: int, window: int | None) -> float:
        """Return 6 * heads * head_dim for each attended token and for each of keys and values.
        Without a window a token attends to half of the sequence on average."""
        w = min(window or seq_len, seq_len)
        return 6.0 * self.model.heads * sum(self.head_dims) * (w - w * w / (2 * seq_len))

    def activation_bytes(self, mesh: MeshShape, tokens: int, element: int) -> int:
        """Return the bytes of queries, keys, values, outputs, gates and log-sum-exps."""
        u, heads = tokens // mesh.cp, self.model.heads
        gates = 2 * heads * self.head_dims[1] if self.model.attention_gate else 0
        kept = u * ((heads + self.kv_heads) * sum(self.head_dims) + gates) // mesh.tp
        return element * kept + 4 * u * heads // mesh.tp

    def message_bytes(self, mesh: MeshShape, tokens: int, method: Method, element: int) -> int:
        """Return the peak bytes of messages over cp.

        ring: two messages of keys and values, and two messages of their gradients.
        allgather: keys and values of whole rows, and their gradients.
        ulysses: the send and receive buffers."""
        if mesh.cp == 1:
            return 0
        u = tokens // mesh.cp
        kv = element * u * self.kv_heads * sum(self.head_dims) // mesh.tp
        q = element * u * self.model.heads * sum(self.head_dims) // mesh.tp  # and outputs
        return {"ring": 4 * kv, "allgather": 2 * mesh.cp * kv, "ulysses": 2 * (q + kv)}[method]

    def check_model(self) -> None:
        m = self.model
        if m.heads % m.kv_heads:
            raise UserError(
                f"model.heads={m.heads}, model.kv_heads={m.kv_heads}: kv_heads must divide heads; "
                f"use --model.kv-heads {nearest_divisor(m.heads, m.kv_heads)}"
            )
        if m.positions == "rotary" and (self.rotary_dim % 2 or not self.rotary_dim):
            raise UserError(
                f"model.head_dim={m.head_dim} with model.rope.partial={m.rope.partial}: rotary "
                f"positions rotate pairs, and {self.rotary_dim} dims are none; change one of them "
                "so that their product is even"
            )

    def check_mesh(self, mesh: MeshShape, seq_len: int, method: Method) -> None:
        for axis in dict.fromkeys(("heads", self.kv_axis)):
            divides(f"model.{axis}", getattr(self.model, axis), "tp", mesh.tp)
        size, both = self.kv_heads, mesh.tp * mesh.cp
        if mesh.cp > 1 and method == "ulysses" and size % both:
            raise UserError(
                f"--cp-method ulysses over cp={mesh.cp}: it shards the heads, and a rank has "
                f"{size // mesh.tp} of model.{self.kv_axis}={size}, which cp must divide; use "
                f"--cp-method ring, which takes any number of heads, or "
                f"--model.{self.kv_axis.replace('_', '-')} {-(-size // both) * both}"
            )

    def check_kernel(self, path: AttentionPath, dtype: torch.dtype, device: str) -> None:
        m, least, reason = self.model, min(self.head_dims), None
        if path == "sdpa":
            if m.softcap is not None:
                reason = f"model.softcap={m.softcap}: torch's fused attention has no soft-cap"
            elif m.sinks:
                reason = "model.sinks=True: torch's fused attention has no sinks"
        elif path == "flex":
            if device == "cpu":
                reason = "device=cpu: flex_attention has no backward there"
            elif least < LEAST_HEAD_DIM:
                reason = f"{self.width_name}{least}: its kernels take {LEAST_HEAD_DIM} and more"
            elif dtype == torch.float64:
                reason = "dtype=float64: its kernels add up in float32"
        if reason:
            raise UserError(f"--attention-kernel {path} with {reason}; use --attention-kernel auto")


class NoPEMixer(AttentionMixer):
    """Grouped-query attention without positions (Kazemnejad et al. 2023, arXiv:2305.19466), in
    models whose other layers rotate."""

    def rope(self, window: int | None) -> RopeConfig | None:
        return None
