"""The core of gated delta net on a rank: everything between the projections, for a rank's own heads
and its own tokens. gated_delta_net.py has the layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dtron.layers.delta_rule import DeltaTokens, delta_rule
from dtron.layers.mixer import MixerInputs
from dtron.layers.norm import Norm, norm
from dtron.layers.short_convolution import halo, short_convolution, update_tail
from dtron.layers.state_passing import SequenceRanks
from dtron.mesh import Layout

Gate = Literal["silu", "sigmoid"]
GATES: dict[Gate, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


@dataclass(frozen=True)
class DeltaNetCache:
    """The decoding cache of one layer.

    ``tail_TC``: the last tokens before the convolution, ``[rows * (taps - 1) @tokens, C@tp]``.
    ``state_BNKV``: the states, ``[rows@tokens, N@value_heads, K, V]``."""

    tail_TC: Tensor
    state_BNKV: Tensor


@dataclass(frozen=True, kw_only=True)
class DeltaNetInputs(MixerInputs):
    """The inputs of gated delta net.

    ``chunk``: see ``DeltaNetConfig``.
    ``gate``: the activation function of the output gate, a key of ``GATES``.
    ``seq_len``: a rank's tokens of each row.
    ``sees_TK``: see short_convolution.py.
    ``place [1]``: the index of this rank's shard of each row.
    ``last_B``: see ``StageInputs``.
    ``cache``: a ``DeltaNetCache``."""

    chunk: int
    gate: Gate
    seq_len: int
    sees_TK: Tensor
    place: Tensor
    last_B: Tensor | None


class Projected(NamedTuple):
    """The projections of the tokens. ``gate``, ``beta`` and ``decay`` are before their activation
    functions. ``decay`` is ``[T, N]``, or ``[T, N, K]`` with a decay for each channel of the keys;
    ``dt_bias`` in ``HeadWeights`` is ``[N]`` or ``[N, K]``."""

    q_TNH: Tensor
    k_TNH: Tensor
    v_TNH: Tensor
    gate_TNH: Tensor
    beta_TN: Tensor
    decay: Tensor


class HeadWeights(NamedTuple):
    """The weights of the heads in the local region."""

    taps_q: Tensor
    taps_k: Tensor
    taps_v: Tensor
    a_log: Tensor
    dt_bias: Tensor
    scale: Tensor


class Past(NamedTuple):
    """The fields of the cache and ``last_B`` (None: no generation)."""

    tail_TC: Tensor | None = None
    state_BNKV: Tensor | None = None
    last_B: Tensor | None = None


def delta_net_core(x: Projected, w: HeadWeights, inputs: DeltaNetInputs, layout: Layout) -> Tensor:
    """Apply everything between the projections: ``[T@tokens, N@value_heads, V]``. Sends over cp."""
    keys, values = ("tokens", "key_heads", None), ("tokens", "value_heads", None)
    per_head, own = values[:2], ("value_heads", None)
    ins: list[tuple[str | None, ...]] = [keys, keys, values, values, per_head]
    ins += [values[: x.decay.ndim], *[("taps", "key_heads", None)] * 2]
    ins += [("taps", "value_heads", None), own[:1], own[: w.dt_bias.ndim], (None,)]
    ins += [("tokens", None), per_head, ("tokens", "value_heads", None, None), ("tokens",)]
    cache, past = inputs.cache, Past()
    if cache is not None:
        past = Past(cache.tail_TC, cache.state_BNKV, inputs.last_B)
    region = layout.local_map(partial(_on_rank, inputs=inputs, layout=layout), ins, values)
    return region(*x, *w, inputs.sees_TK, *past)


def _on_rank(*tensors: Any, inputs: DeltaNetInputs, layout: Layout) -> Tensor:
    """Compute ``[T, N, V]`` for a rank's own tokens and heads.

    ``tensors``: the fields of ``Projected``, ``HeadWeights``, then ``sees_TK`` and ``Past``."""
    x, w, sees_TK = Projected(*tensors[:6]), HeadWeights(*tensors[6:12]), tensors[12]
    past, seq_len = Past(*tensors[13:]), inputs.seq_len
    q, k, v = _convolved(x, w, sees_TK, past, inputs, layout)
    beta = _rows(x.beta_TN, seq_len).sigmoid()
    dtype = torch.promote_types(v.dtype, torch.float32)
    # Each [..., N, K], or [..., N, 1] for a decay of the whole head.
    a, dt_bias, a_log = (
        t.to(dtype).unflatten(-1, (-1, 1)) if t.ndim < ndim else t.to(dtype)
        for t, ndim in ((x.decay, 3), (w.dt_bias, 2), (w.a_log, 2))
    )
    log_decay = _rows(-a_log.exp() * F.softplus(a + dt_bias), seq_len)
    starts, ranks, group = ~_rows(sees_TK, seq_len)[..., 1], None, layout.group("cp")
    if past.last_B is not None:  # the state goes on, and padding does not change it
        padding = (torch.arange(seq_len, device=v.device) > past.last_B[:, None])[..., None]
        beta = beta.masked_fill(padding, 0.0)
        log_decay, starts = log_decay.masked_fill(padding[..., None], 0.0), None
    elif group is not None:
        ranks = SequenceRanks(group, inputs.place)
    q, k = _of_norm_1(q) * q.shape[-1] ** -0.5, _of_norm_1(k)
    q, k = (t.repeat_interleave(v.shape[2] // t.shape[2], dim=2) for t in (q, k))
    tokens = DeltaTokens(q, k, v, log_decay, beta, starts)
    o, state = delta_rule(tokens, past.state_BNKV, inputs.chunk, ranks)
    if past.state_BNKV is not None:
        past.state_BNKV.copy_(state)
    y = norm(Norm(w.scale, None), o.flatten(0, 1), inputs.eps)
    return (y.to(dtype) * GATES[inputs.gate](x.gate_TNH.to(dtype))).to(y.dtype)


def _convolved(
    x: Projected,
    w: HeadWeights,
    sees_TK: Tensor,
    past: Past,
    inputs: DeltaNetInputs,
    layout: Layout,
) -> list[Tensor]:
    """Convolve queries, keys and values, and apply silu: ``[B, S, N, H]`` each."""
    parts = x.q_TNH, x.k_TNH, x.v_TNH
    mixed = _rows(torch.cat([t.flatten(1) for t in parts], dim=-1), inputs.seq_len)
    taps = torch.cat([t.flatten(1) for t in (w.taps_q, w.taps_k, w.taps_v)], dim=-1)
    sees = None
    if past.tail_TC is None:
        before, sees = halo(mixed, len(taps), layout), _rows(sees_TK, inputs.seq_len)
    else:
        before = past.tail_TC.unflatten(0, (-1, len(taps) - 1)).to(mixed.dtype)
    y = F.silu(short_convolution(mixed, taps, before, sees))
    if past.tail_TC is not None and past.last_B is not None:
        update_tail(mixed, past.tail_TC.unflatten(0, (-1, len(taps) - 1)), past.last_B)
    pieces = y.split([t.shape[1] * t.shape[2] for t in parts], dim=-1)
    return [y.unflatten(-1, t.shape[1:]) for y, t in zip(pieces, parts, strict=True)]


def _rows(x: Tensor, seq_len: int) -> Tensor:
    return x.unflatten(0, (-1, seq_len))


def _of_norm_1(x: Tensor) -> Tensor:
    """Divide by the norm over the last dim, in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
