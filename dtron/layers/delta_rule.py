"""The gated delta rule (Yang et al. 2024, arXiv:2412.06464, equation 10), a form of linear
attention.

Each head has a state S, a matrix ``[K, V]``. It is a memory: S^T k is the value that is stored
under the key k. Each token first multiplies the state by its decay a. Then it reads the value under
its key, and moves that value towards its own value v by the fraction b. At last it reads under its
query:

    S  <-  a S
    S  <-  S + b k (v - S^T k)^T
    o   =  S^T q

``delta_rule_by_token`` is this definition. ``delta_rule`` computes the same with matmuls.

**The chunked form.** Take a chunk of L tokens, and S the state before it. Token i adds k_i u_i^T to
the state, where u_i is its corrected value. The correction depends on the earlier tokens of the
chunk, because they have changed the memory too. With G_i the product of the decays up to token i:

    u_i = b_i (v_i - G_i S^T k_i - sum over j < i of (G_i / G_j) (k_i . k_j) u_j)

All u of a chunk are the solution of one unit lower triangular system. Its right side is affine in
S, so the solution is too: u = U - W S. This is the WY representation of a product of matrices
I - b k k^T (section 3.2 of the paper). U and W do not depend on S, so all chunks compute them at
once. The rest is matmuls:

    o_i  =  G_i S^T q_i + sum over j <= i of (G_i / G_j) (q_i . k_j) u_j
    S'   =  G_L S + sum over j of (G_L / G_j) k_j u_j^T

The second line, with u = U - W S, is an affine map of S. state_passing.py combines the maps of
chunks and of cp ranks.

**Documents.** The state must be zero at the first token of a document. A decay of zero has no
logarithm. So a quotient G_i / G_j, with j before the document of i, is set to zero instead; the
same for G_i S and for G_L / G_j.

Quotients are computed as exp(log G_i - log G_j), which never exceeds 1. Everything here is in
float32 at least.

Left out: the inverse of the system as a product (I - N)(I + N^2)(I + N^4)..., which is matmuls
alone: its factors grow far beyond the inverse where keys are alike. Also left out: matmuls in
bfloat16, as fused kernels have them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dtron.layers.state_passing import Maps, SequenceRanks, states_before


class DeltaTokens(NamedTuple):
    """The tokens of the delta rule.

    ``q``, ``k``: queries and keys, ``[B, S, N, K]``.
    ``v``: values, ``[B, S, N, V]``.
    ``log_decay``: the logarithm of each token's decay, at most 0, ``[B, S, N]``.
    ``beta``: the fraction by which a token moves the stored value, ``[B, S, N]``.
    ``starts_BS``: whether a token is the first one of its document (None: no token is)."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor
    starts_BS: Tensor | None = None

    def wide(self) -> DeltaTokens:
        """Return the same tokens in float32 at least."""
        dtype = torch.promote_types(self.v.dtype, torch.float32)
        q, k, v, log_decay, beta = (x.to(dtype) for x in self[:5])
        return DeltaTokens(q, k, v, log_decay, beta, self.starts_BS)


def delta_rule_by_token(tokens: DeltaTokens, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Apply the rule token by token. This is the definition; ``delta_rule`` is fast.

    Returns ``(o [B, S, N, V], state [B, N, K, V])``: the outputs, and the state after the last
    token.

    ``state``: the state before the first token (None: zero)."""
    q, k, v, log_decay, beta, starts_BS = tokens.wide()
    if state is None:
        state = k.new_zeros(k.shape[0], *k.shape[2:], v.shape[-1])
    outputs = []
    for t in range(k.shape[1]):
        decay = log_decay[:, t].exp()
        if starts_BS is not None:
            decay = decay.masked_fill(starts_BS[:, t, None], 0.0)
        state = decay[..., None, None] * state
        stored = torch.einsum("bnkv,bnk->bnv", state, k[:, t])
        change = beta[:, t, :, None] * (v[:, t] - stored)
        state = state + torch.einsum("bnk,bnv->bnkv", k[:, t], change)
        outputs.append(torch.einsum("bnkv,bnk->bnv", state, q[:, t]))
    return torch.stack(outputs, dim=1).to(tokens.v.dtype), state


def delta_rule(
    tokens: DeltaTokens,
    state: Tensor | None = None,
    chunk: int = 64,
    ranks: SequenceRanks | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply the rule in chunks. Returns the same as ``delta_rule_by_token``. Rank-local, except for
    the states over cp.

    ``chunk``: the number of tokens in a chunk.
    ``ranks``: the cp ranks that share the sequences (None: rows are whole); see
        state_passing.py."""
    seq_len = tokens.k.shape[1]
    chunks = _chunks(tokens.wide(), min(chunk, seq_len))
    states, last = states_before(chunks.maps, state, ranks)
    o = chunks.q @ states + chunks.scores @ (chunks.u - chunks.w @ states)  # [C, B, N, L, V]
    o = o.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :seq_len]
    return o.to(tokens.v.dtype), last


class _Chunks(NamedTuple):
    """The parts of the rule that do not depend on the state, for all chunks: ``[C, B, N, ...]``.

    ``q``: queries times G_i, ``[..., L, K]``.
    ``scores``: (G_i / G_j) (q_i . k_j) for j <= i, ``[..., L, L]``.
    ``u``, ``w``: U and W of the WY representation, ``[..., L, V]`` and ``[..., L, K]``.
    ``maps``: the affine map of each chunk."""

    q: Tensor
    scores: Tensor
    u: Tensor
    w: Tensor
    maps: Maps


def _chunks(tokens: DeltaTokens, size: int) -> _Chunks:
    q, k, v = (_split(x, size) for x in tokens[:3])
    log_decay, beta = (_split(x[..., None], size)[..., 0] for x in tokens[3:5])
    log_g = log_decay.cumsum(-1)  # [C, B, N, L]
    i_after_j = torch.ones(size, size, dtype=torch.bool, device=k.device).tril()
    kept, before, after = i_after_j, None, None
    if tokens.starts_BS is not None:
        starts = _split(tokens.starts_BS[..., None, None].to(k.dtype), size)[..., 0]
        document = starts.cumsum(-1)  # [C, B, 1, L]; 0 is the document of the state before
        kept = kept & (document[..., :, None] == document[..., None, :])
        before, after = document != 0, document != document[..., -1:]
    g_ij = _exp(log_g[..., :, None] - log_g[..., None, :], ~kept)
    g_i = _exp(log_g, before)[..., None]
    g_last = _exp(log_g[..., -1:] - log_g, after)[..., None]

    system = (beta[..., None] * k) @ k.mT * g_ij  # the solver reads what is below the diagonal
    right = beta[..., None] * torch.cat([v, g_i * k], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    u, w = solved.split([v.shape[-1], k.shape[-1]], dim=-1)

    k_last = (g_last * k).mT
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    maps = Maps(g_i[..., -1:, :] * eye - k_last @ w, k_last @ u)
    return _Chunks(g_i * q, q @ k.mT * g_ij, u, w, maps)


def _exp(x: Tensor, zero: Tensor | None) -> Tensor:
    """Return exp(x), and 0 with gradient 0 where ``zero``."""
    return (x if zero is None else x.masked_fill(zero, float("-inf"))).exp()


def _split(x: Tensor, size: int) -> Tensor:
    """Split rows into chunks: ``[B, S, N, H]`` -> ``[C, B, N, L, H]``. The last chunk is padded
    with zeros: a token with beta 0 and log decay 0 does not change the state."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size))
    return x.unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4)
