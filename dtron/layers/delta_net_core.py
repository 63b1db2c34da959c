"""The core of gated delta net on a rank: everything between the projections, for a rank's own heads
and its own tokens. gated_delta_net.py has the layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dtron.layers.delta_rule import DeltaTokens, delta_rule
from dtron.layers.norm import Norm, norm
from dtron.layers.recurrent_mixer import (
    REGION_AXES,
    Past,
    RecurrentInputs,
    by_rows,
    convolved,
    document_starts,
    padding,
    sequence_ranks,
)
from dtron.mesh import Layout

Gate = Literal["silu", "sigmoid"]
GATES: dict[Gate, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


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


def delta_net_core(
    x: Projected, w: HeadWeights, inputs: RecurrentInputs, gate: Gate, layout: Layout
) -> Tensor:
    """Apply everything between the projections: ``[T@tokens, N@value_heads, V]``. Sends over cp.

    ``gate``: the activation function of the output gate."""
    keys, values = ("tokens", "key_heads", None), ("tokens", "value_heads", None)
    per_head, own = values[:2], ("value_heads", None)
    ins: list[tuple[str | None, ...]] = [keys, keys, values, values, per_head]
    ins += [values[: x.decay.ndim], *[("taps", "key_heads", None)] * 2]
    ins += [("taps", "value_heads", None), own[:1], own[: w.dt_bias.ndim], (None,)]
    core = partial(_on_rank, inputs=inputs, gate=gate, layout=layout)
    return layout.local_map(core, ins + REGION_AXES, values)(*x, *w, *inputs.region_inputs())


def _on_rank(*tensors: Any, inputs: RecurrentInputs, gate: Gate, layout: Layout) -> Tensor:
    """Compute ``[T, N, V]`` for a rank's own tokens and heads.

    ``tensors``: the fields of ``Projected``, ``HeadWeights``, then ``sees_TK`` and ``Past``."""
    x, w, sees_TK = Projected(*tensors[:6]), HeadWeights(*tensors[6:12]), tensors[12]
    past, seq_len = Past(*tensors[13:]), inputs.seq_len
    parts, taps = (x.q_TNH, x.k_TNH, x.v_TNH), (w.taps_q, w.taps_k, w.taps_v)
    q, k, v = convolved(parts, taps, (), sees_TK, past, inputs, layout)
    beta = by_rows(x.beta_TN, seq_len).sigmoid()
    beta = beta if inputs.largest_beta == 1 else inputs.largest_beta * beta
    dtype = torch.promote_types(v.dtype, torch.float32)
    # Each [..., N, K], or [..., N, 1] for a decay of the whole head.
    a, dt_bias, a_log = (
        t.to(dtype).unflatten(-1, (-1, 1)) if t.ndim < ndim else t.to(dtype)
        for t, ndim in ((x.decay, 3), (w.dt_bias, 2), (w.a_log, 2))
    )
    log_decay = by_rows(-a_log.exp() * F.softplus(a + dt_bias), seq_len)
    starts, unused = document_starts(sees_TK, past, seq_len), padding(past, seq_len)
    if unused is not None:  # padding does not change the state
        beta = beta.masked_fill(unused[..., None], 0.0)
        log_decay = log_decay.masked_fill(unused[..., None, None], 0.0)
    q, k = _of_norm_1(q) * q.shape[-1] ** -0.5, _of_norm_1(k)
    q, k = (t.repeat_interleave(v.shape[2] // t.shape[2], dim=2) for t in (q, k))
    tokens = DeltaTokens(q, k, v, log_decay, beta, starts)
    ranks = sequence_ranks(inputs, past, layout)
    o, state = delta_rule(tokens, past.state_BNKV, inputs.chunk, ranks)
    if past.state_BNKV is not None:
        past.state_BNKV.copy_(state)
    y = norm(Norm(w.scale, None), o.flatten(0, 1), inputs.eps)
    return (y.to(dtype) * GATES[gate](x.gate_TNH.to(dtype))).to(y.dtype)


def _of_norm_1(x: Tensor) -> Tensor:
    """Divide by the norm over the last dim, in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
