"""Grouped-query attention as a mixer, with and without positions. attention.py has the layer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from dtron.bounds import divides, nearest_divisor
from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.layers.attention import Attention, attention, attention_outputs
from dtron.layers.attention_core import AttentionInputs
from dtron.layers.attention_kernels import LEAST_HEAD_DIM, AttentionPath
from dtron.layers.attention_mask import AttentionMask, chunks_of_documents
from dtron.layers.context_parallel import Method, RowSharding, prepare
from dtron.layers.kv_cache import KVCache, empty_kv_cache
from dtron.layers.mixer import Mixer, StageInputs, TokenData
from dtron.layers.rope import RopeConfig, rope_tables
from dtron.layers.token_order import TokenOrder
from dtron.mesh import Layout


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
        if self.model.qk_norm_over == "rotated":
            return ()
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
        factor_T = self.query_factor(batch.positions_T, layout)
        tables: dict[RopeConfig | None, Tensor | None] = {None: None}
        inputs = {}
        for window in stage.windows:
            rope = self.rope(window)
            if rope is not None and rope not in tables:
                make = partial(rope_tables, rope, head_dim=self.rotary_dim, dtype=stage.x_TD.dtype)
                in_region = layout.local_map(make, (("tokens",),), ("tokens", None))
                tables[rope] = in_region(batch.positions_T)
            shape, documents_T = self._shape(batch, window, layout)
            mask, path = prepare(
                replace(shape, softcap=m.softcap, scale=self.score_scale(rope)),
                documents_T,
                m.sinks,
                self.head_dims,
                stage.x_TD,
                layout,
                stage.kernel,
                RowSharding(stage.cp_method, batch.zigzag),
            )
            inputs[window] = AttentionInputs(
                documents_T=documents_T,
                mask=mask,
                table_TH=tables[rope],
                path=path,
                positions_T=batch.positions_T,
                query_factor_T=factor_T,
                norm_rotated=m.qk_norm and m.qk_norm_over == "rotated",
            )
        return inputs

    def query_factor(self, positions_T: Tensor, layout: Layout) -> Tensor | None:
        """Return the factor of each token's queries, ``[T@tokens]``; None: no factor."""
        return None

    def _shape(
        self, batch: TokenData, window: int | None, layout: Layout
    ) -> tuple[AttentionMask, Tensor | None]:
        """Return the mask of a window, and the documents. A chunk of a packed document is a
        document of its own."""
        documents_T, chunked = batch.documents_T, self.model.window_kind == "chunked"
        if window is None or not chunked or documents_T is None:
            return AttentionMask(batch.seq_len, window, chunked=chunked), documents_T
        cut = partial(chunks_of_documents, seq_len=batch.seq_len, size=window)
        documents_T = layout.local_map(cut, [("rows",)], ("rows",))(documents_T)
        return AttentionMask(batch.seq_len), documents_T

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
        Without a window a token attends to half of the sequence on average, with chunks to half of
        its chunk."""
        w = min(window or seq_len, seq_len)
        seen = w / 2 if self.model.window_kind == "chunked" else w - w * w / (2 * seq_len)
        return 6.0 * self.model.heads * sum(self.head_dims) * seen

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
    models whose other layers rotate.

    With more keys, softmax spreads further. A factor on the queries, which grows with the position,
    can work against it (Nakanishi 2025, arXiv:2501.19399); Llama 4 has one."""

    def rope(self, window: int | None) -> RopeConfig | None:
        return None

    def query_factor(self, positions_T: Tensor, layout: Layout) -> Tensor | None:
        scale, floor = self.model.attention_temperature, self.model.attention_temperature_floor
        if not scale:
            return None

        def factor(positions_T: Tensor) -> Tensor:
            return 1 + scale * torch.log1p(((positions_T.float() + 1) / floor).floor())

        return layout.local_map(factor, [("tokens",)], ("tokens",))(positions_T)
