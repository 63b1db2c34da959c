"""The recurrence of Mamba-2, structured state space duality, SSD (Dao & Gu 2024, arXiv:2405.21060).

Each head has a state S, a matrix ``[K, V]``. A token first multiplies the state by its decay a,
adds the outer product of its key and its value, and reads under its query:

    S  <-  a S + k v^T
    o   =  S^T q

This is linear attention with a decay (equation 16 of the paper, with the names of attention: its B
is the key k, its C is the query q, and its input X, times the time step, is the value v). Unlike
the delta rule (delta_rule.py) a token adds to the state without reading it. So a chunk has no
system of equations:

    o_i  =  G_i S^T q_i + sum over j <= i of (G_i / G_j) (q_i . k_j) v_j
    S'   =  G_L S + sum over j of (G_L / G_j) k_j v_j^T

G_i is the product of the decays of the chunk up to token i; state_chunks.py computes the quotients.
The second line is an affine map of S, whose transition is a number. state_passing.py combines the
maps of chunks and of cp ranks (section 6 of the paper).

A head of keys and queries serves a group of heads of values (the paper's multi-value attention,
section 7.2). The products q_i . k_j are computed once for a group.

``ssd_by_token`` is the definition; ``ssd`` computes the same with matmuls. Everything here is in
float32 at least.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dtron.layers.state_chunks import decays, exp_or_zero, joined, split
from dtron.layers.state_passing import Maps, SequenceRanks, states_before
from dtron.layers.wide_product import wide_product


class SSDTokens(NamedTuple):
    """The tokens of the recurrence.

    ``q``, ``k``: queries and keys (C and B in the paper), ``[B, S, G, K]``; G divides N.
    ``v``: values, the inputs times the time steps, ``[B, S, N, V]``.
    ``log_decay``: the logarithm of each token's decay, at most 0, ``[B, S, N]``.
    ``starts_BS``: whether a token is the first one of its document (None: no token is)."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    starts_BS: Tensor | None = None

    def wide(self) -> SSDTokens:
        """Return the same tokens in float32 at least."""
        dtype = torch.promote_types(self.v.dtype, torch.float32)
        q, k, v, log_decay = (x.to(dtype) for x in self[:4])
        return SSDTokens(q, k, v, log_decay, self.starts_BS)


def ssd_by_token(tokens: SSDTokens, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Apply the recurrence token by token. This is the definition; ``ssd`` is fast.

    Returns ``(o [B, S, N, V], state [B, N, K, V])``: the outputs, and the state after the last
    token.

    ``state``: the state before the first token (None: zero)."""
    q, k, v, log_decay, starts_BS = tokens.wide()
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
    if state is None:
        state = k.new_zeros(k.shape[0], *k.shape[2:], v.shape[-1])
    outputs = []
    for t in range(k.shape[1]):
        decay = log_decay[:, t].exp()
        if starts_BS is not None:
            decay = decay.masked_fill(starts_BS[:, t, None], 0.0)
        state = decay[..., None, None] * state
        state = state + torch.einsum("bnk,bnv->bnkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bnkv,bnk->bnv", state, q[:, t]))
    return torch.stack(outputs, dim=1).to(tokens.v.dtype), state


def ssd(
    tokens: SSDTokens,
    state: Tensor | None = None,
    chunk: int = 64,
    ranks: SequenceRanks | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply the recurrence in chunks. Returns the same as ``ssd_by_token``. Rank-local, except for
    the states over cp.

    ``chunk``: the number of tokens in a chunk.
    ``ranks``: the cp ranks that share the sequences (None: rows are whole); see
        state_passing.py."""
    seq_len, groups = tokens.k.shape[1:3]
    wide, size = tokens.wide(), min(chunk, seq_len)
    q, k = (split(x, size)[:, :, :, None] for x in wide[:2])  # [C, B, G, 1, L, K]
    found = decays(split(wide.log_decay[..., None], size), wide.starts_BS)
    v, log_g, g_i, g_last = (  # [C, B, G, N / G, L, ...]
        x.unflatten(2, (groups, -1)) for x in (split(wide.v, size), *found[:3])
    )
    kept = found.kept if found.kept.ndim == 2 else found.kept[:, :, :, None]

    dtype = tokens.v.dtype
    scores = wide_product(q, k.mT, dtype) * exp_or_zero(log_g - log_g.mT, ~kept)
    maps = Maps(g_i[..., -1:, :], None, _for_each_head(k.mT, g_last * v, dtype))
    if state is not None:
        state = state.unflatten(1, (groups, -1))
    states, last = states_before(maps, state, ranks)
    o = g_i * _for_each_head(q, states, dtype) + wide_product(scores, v, dtype)
    return joined(o.flatten(2, 3), seq_len).to(dtype), last.flatten(1, 2)


def _for_each_head(x: Tensor, heads: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply what the heads of a group share with what each head has, as one matmul:
    ``[..., 1, M, K] @ [..., N, K, V]`` -> ``[..., N, M, V]``."""
    columns = heads.movedim(-3, -2).flatten(-2).unsqueeze(-3)  # [..., 1, K, N * V]
    made = wide_product(x, columns, dtype).squeeze(-3)
    return made.unflatten(-1, (heads.shape[-3], -1)).movedim(-2, -3)
