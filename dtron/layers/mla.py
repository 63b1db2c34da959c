"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1; the same in V3,
arXiv:2412.19437).

Keys and values of all heads are projected from one short vector per token, the latent ``c_TR``. A
server has to cache only this latent and a rotary key: 512 and 64 numbers per token. Keys and values
of 128 heads would be 32,768 numbers. Queries may have a latent of their own, which saves
activations in training. A head's score has two parts. One part uses keys from the latent, without
positions: with a rotation in between, the up-projection could not be folded into the query. The
other part uses a rotary key that all heads share. So keys are wider than values, 192 and 128.

Tensor parallelism shards the heads, as in attention.py. The down-projections have no heads: every
rank holds them whole and runs them on its own tokens under sequence parallelism. So no rank repeats
another rank's work. Their gradients are sums pending over tp, like a norm's gradients. Then the
latents are all-gathered over tp: 2,112 numbers per token in DeepSeek-V3, instead of the 7,168 of
the residual stream. Without a latent for queries (V2-Lite) the residual stream is gathered in the
same collective.

Rotation pairs dim i with i + H/2, as everywhere in dtron. In DeepSeek's weights the two dims of a
pair are adjacent. The difference is a permutation of the rotary columns of ``w_q_up`` and
``w_kv_down``. The code that reads these weights must apply it.

In generation, attention runs in the space of latents, and the cache has latents (mla_decoding.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dtron.bounds import under
from dtron.errors import UserError
from dtron.layers.attention_core import LARGEST, AttentionInputs, Heads, core, largest
from dtron.layers.attention_mixer import AttentionMixer
from dtron.layers.kv_cache import KVCache, Past
from dtron.layers.linear import linear, linear_in
from dtron.layers.mla_decoding import attend_to_latents, empty_latent_cache
from dtron.layers.norm import Norm, norm
from dtron.layers.rope import RopeConfig, rotate
from dtron.mesh import Layout
from dtron.params import part, residual_out, weight


@dataclass(frozen=True)
class MLAConfig:
    """Sizes of multi-head latent attention, which replaces plain attention where kv_rank is
    given."""

    kv_rank: int = 0
    """width of the latent of keys and values; 0: plain attention"""
    q_rank: int = 0
    """width of the latent of queries; 0: queries are made from the residual stream"""
    nope_dim: int = 128
    """width of a head's queries and keys that has no positions"""
    rope_dim: int = 64
    """width that is rotated; its key is shared by all heads"""
    v_dim: int = 128
    """width of a head's values"""
    norm_eps: float = 1e-6
    """added to the variance in the norms of the latents; DeepSeek's models have 1e-6 here, whatever
    model.norm_eps is"""

    def __post_init__(self) -> None:
        if min(self.kv_rank, self.q_rank) < 0 or min(self.nope_dim, self.rope_dim, self.v_dim) < 1:
            raise UserError(
                f"model.mla kv_rank={self.kv_rank}, q_rank={self.q_rank}, "
                f"nope_dim={self.nope_dim}, rope_dim={self.rope_dim}, v_dim={self.v_dim}: ranks "
                "are at least 0 and widths at least 1; raise them"
            )
        if self.rope_dim % 2:
            raise UserError(
                f"model.mla.rope_dim={self.rope_dim}: rotary positions rotate pairs; make it even"
            )
        if self.q_rank and not self.kv_rank:
            raise UserError(
                f"model.mla.q_rank={self.q_rank} with kv_rank=0, which is plain attention; give "
                "--model.mla.kv-rank too, or drop q_rank"
            )
        under(self, "model.mla", {"norm_eps": float("inf")})

    @property
    def qk_dim(self) -> int:
        return self.nope_dim + self.rope_dim

    def dims(self) -> dict[str, Any]:
        """Return sizes and flags for the declaration of ``MLA``."""
        return {
            "q_rank": self.q_rank,
            "whole_q": self.q_rank == 0,
            "kv_rank": self.kv_rank,
            "kv_latent": self.kv_rank + self.rope_dim,
            "qk_dim": self.qk_dim,
            "kv_dim": self.nope_dim + self.v_dim,
            "v_dim": self.v_dim,
        }


@dataclass(frozen=True)
class MLA:
    """The weights. ``w_kv_down`` makes the latent and the shared rotary key. ``w_kv_up`` makes the
    keys and values of all heads from the latent. ``act_q_rank`` names the query latent's dim in an
    activation, which is never sharded. ``q_rank`` names this dim in a weight that ZeRO may shard.
    ``act_embed`` and ``embed`` differ in the same way."""

    segment: ClassVar[str] = "mla"

    w_q_down: Tensor | None = weight("embed", "act_q_rank", summed=1, when="q_rank")
    q_norm: Norm | None = part(when="q_rank", act_embed="act_q_rank")
    w_q_up: Tensor | None = weight("q_rank", "heads", "qk_dim", summed=1, when="q_rank")
    w_q: Tensor | None = weight("embed", "heads", "qk_dim", summed=1, when="whole_q")
    w_kv_down: Tensor = weight("embed", "kv_latent", summed=1)
    kv_norm: Norm = part(act_embed="act_kv_rank")
    w_kv_up: Tensor = weight("kv_rank", "heads", "kv_dim", summed=1)
    w_o: Tensor = weight("heads", "v_dim", "embed", summed=2, init=residual_out)


def mla(p: MLA, x_TD: Tensor, inputs: AttentionInputs, layout: Layout) -> Tensor:
    """Apply the layer: ``x_TD [T@tokens_sp, D]`` -> the same shape and placement. The rotary angles
    ``inputs.table_TH`` are as wide as ``rope_dim`` (None: no positions)."""
    return mla_outputs(p, x_TD, inputs, layout, logits=False)[0]


def mla_outputs(
    p: MLA, x_TD: Tensor, inputs: AttentionInputs, layout: Layout, logits: bool
) -> tuple[Tensor, ...]:
    """Return the result of ``mla``, and with ``logits`` also the largest logit of each head:
    ``[N@heads]``, a pending maximum over tokens."""
    table_TH, recipe = inputs.table_TH, inputs.recipe
    q_TR, c_TR, k_TH = latents(p, x_TD, inputs, layout)
    w_q = p.w_q if p.w_q_up is None else p.w_q_up
    assert w_q is not None
    q_TNH = linear(q_TR, w_q, recipe=recipe)  # local
    if inputs.cache is not None:
        o_TNH = attend_to_latents(q_TNH, c_TR, k_TH, p.w_kv_up, inputs, layout)
        y_TD = linear_in(o_TNH, p.w_o, recipe)
        return (layout.constrain(y_TD, "tokens_sp", "act_embed"),)  # reduce-scatter over tp
    kv_TNH = linear(c_TR, p.w_kv_up, recipe=recipe)
    heads, shared = ("tokens", "heads", None), ("tokens", None)
    ins = (heads, heads, shared, shared, ("rows",))

    def on_rank(
        q_TNH: Tensor,
        kv_TNH: Tensor,
        k_TH: Tensor,
        table_TH: Tensor | None,
        documents_T: Tensor | None,
    ) -> tuple[Tensor, ...]:
        own = heads_of(q_TNH, kv_TNH, k_TH, table_TH)
        o_TNH = core(own, documents_T, None, Past(), inputs, layout)
        return (o_TNH, largest(own, documents_T, inputs, layout)) if logits else (o_TNH,)

    # Communication over cp: see context_parallel.py.
    o_TNH, *largest_N = layout.local_map(on_rank, ins, [heads, LARGEST] if logits else [heads])(
        q_TNH, kv_TNH, k_TH, table_TH, inputs.documents_T
    )
    y_TD = linear_in(o_TNH, p.w_o, recipe)  # {+tp}: a sum still pending
    return layout.constrain(y_TD, "tokens_sp", "act_embed"), *largest_N  # reduce-scatter over tp


def latents(
    p: MLA, x_TD: Tensor, inputs: AttentionInputs, layout: Layout, *more_TX: Tensor
) -> list[Tensor]:
    """Return the latent of queries (without one: the residual stream), the latent of keys and
    values, and the rotary key: ``[T@tokens, ...]`` each.

    ``more_TX``: other numbers of each token, ``[T@tokens_sp, ...]``, for the same all-gather. They
        are returned too."""
    recipe, eps = inputs.recipe, inputs.eps
    q_TR = x_TD  # local, like the next lines: each rank has its own tokens
    if p.w_q_down is not None and p.q_norm is not None:
        q_TR = norm(p.q_norm, linear(x_TD, p.w_q_down, recipe=recipe), eps)
    rank = p.kv_norm.scale.shape[0]
    rope_dim = p.w_kv_down.shape[-1] - rank
    c_TR, k_TH = linear(x_TD, p.w_kv_down, recipe=recipe).split([rank, rope_dim], dim=-1)
    all_TR = torch.cat([q_TR, norm(p.kv_norm, c_TR, eps), k_TH, *more_TX], dim=-1)
    all_TR = layout.constrain(all_TR, "tokens", None)  # all-gather over tp
    widths = [q_TR.shape[-1], rank, rope_dim, *(x.shape[-1] for x in more_TX)]
    return list(all_TR.split(widths, dim=-1))


def heads_of(q_TNH: Tensor, kv_TNH: Tensor, k_TH: Tensor, table_TH: Tensor | None) -> Heads:
    """Rotate, and concatenate the two parts of queries and of keys. Rank-local.

    ``k_TH``: the rotary key, which all heads share.
    ``table_TH``: the rotary angles (None: no positions)."""
    nope = q_TNH.shape[-1] - k_TH.shape[-1]
    rotary_q, rotary_k = q_TNH[..., nope:], k_TH[:, None]
    if table_TH is not None:
        rotary_q, rotary_k = rotate(rotary_q, table_TH), rotate(rotary_k, table_TH)
    rotary_k = rotary_k.expand(-1, q_TNH.shape[1], -1)
    q_TNH = torch.cat([q_TNH[..., :nope], rotary_q], dim=-1)
    k_TNH = torch.cat([kv_TNH[..., :nope], rotary_k], dim=-1)
    return Heads(q_TNH, k_TNH, kv_TNH[..., nope:])


class MLAMixer(AttentionMixer):
    """Multi-head latent attention as a mixer. Every head has its own keys and values."""

    params: ClassVar[type] = MLA
    kv_axis: ClassVar[str] = "heads"
    width_name: ClassVar[str] = "heads of width "
    widths: ClassVar[tuple[str, ...]] = ("heads", "mla.q_rank", "mla.kv_rank")

    @property
    def head_dims(self) -> tuple[int, int]:
        return self.model.mla.qk_dim, self.model.mla.v_dim

    @property
    def rotary_dim(self) -> int:
        return self.model.mla.rope_dim

    @property
    def norm_eps(self) -> float:
        return self.model.mla.norm_eps

    @property
    def query_weights(self) -> tuple[str, ...]:
        return ("w_q_up",) if self.model.mla.q_rank else ("w_q",)

    def dims(self) -> dict[str, Any]:
        return self.model.mla.dims()

    def apply(self, p: MLA, x_TD: Tensor, inputs: AttentionInputs, layout: Layout) -> Tensor:
        return mla(p, x_TD, inputs, layout)

    def apply_with_logits(
        self, p: MLA, x_TD: Tensor, inputs: AttentionInputs, layout: Layout
    ) -> tuple[Tensor, ...]:
        return mla_outputs(p, x_TD, inputs, layout, logits=True)

    def empty_cache(
        self, rows: int, slots: int, layout: Layout, dtype: torch.dtype, device: str
    ) -> KVCache:
        width = self.model.mla.kv_rank + self.model.mla.rope_dim
        return empty_latent_cache(rows, slots, width, layout, dtype, device)

    def logit_factors(self, p: Any, factor_N: Tensor) -> dict[str, Tensor]:
        """All heads share the rotary key, so it stays, and the rotary queries take the whole
        factor. Of the other logits, queries and keys take the root each."""
        c, factor_N1 = self.model.mla, factor_N[:, None]
        nope = factor_N1.sqrt().expand(-1, c.nope_dim)
        queries = torch.cat([nope, factor_N1.expand(-1, c.rope_dim)], dim=1)
        keys = torch.cat([nope, torch.ones_like(factor_N1).expand(-1, c.v_dim)], dim=1)
        w_q = p.w_q if p.w_q_up is None else p.w_q_up
        return {w_q.path: queries, p.w_kv_up.path: keys}

    def check_model(self) -> None:
        m = self.model
        if not m.mla.kv_rank:
            raise UserError(
                f"model.pattern={m.pattern}: latent attention has a latent of keys and values; "
                "give --model.mla.kv-rank"
            )
        flags = {"qk_norm": False, "qkv_bias": False, "bias": False, "sinks": False}
        flags["attention_gate"] = False
        for name, only in {**flags, "positions": "rotary"}.items():
            if getattr(m, name) != only:
                raise UserError(
                    f"model.{name}={getattr(m, name)} with model.mla.kv_rank={m.mla.kv_rank}: "
                    f"latent attention has {only} alone; leave {name} out, or use "
                    "--model.mla.kv-rank 0"
                )
        if m.rope.partial != 1:
            raise UserError(
                f"model.rope.partial={m.rope.partial} with model.mla.kv_rank={m.mla.kv_rank}: "
                "latent attention rotates model.mla.rope_dim dims; leave it out"
            )


class NoPEMLAMixer(MLAMixer):
    """Latent attention without positions: nothing is rotated (Kimi Linear, arXiv:2510.26692). All
    heads share the key of width ``rope_dim`` as before."""

    def rope(self, window: int | None) -> RopeConfig | None:
        return None
