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

state_chunks.py computes the quotients of decays. They are zero across the start of a document.

**Decays of channels.** In Kimi delta attention (Kimi Linear, arXiv:2510.26692) each channel of the
keys has its own decay: a is then a diagonal matrix, and so are G_i and G_i / G_j.

Everything here is in float32 at least, but the factors of matmuls are rounded to the dtype of the
values (wide_product.py). A state that passes from chunk to chunk is not: see state_passing.py.

Left out: the inverse of the system as a product (I - N)(I + N^2)(I + N^4)..., which is matmuls
alone: its factors grow far beyond the inverse where keys are alike.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dtron.layers.state_chunks import decays, exp_or_zero, joined, split
from dtron.layers.state_passing import Maps, SequenceRanks, states_before
from dtron.layers.wide_product import wide_product

BLOCK = 16  # rows of a chunk, for decays of channels


class DeltaTokens(NamedTuple):
    """The tokens of the delta rule.

    ``q``, ``k``: queries and keys, ``[B, S, N, K]``.
    ``v``: values, ``[B, S, N, V]``.
    ``log_decay``: the logarithm of each token's decay, at most 0: ``[B, S, N, 1]``, or with a decay
        for each channel of the keys ``[B, S, N, K]``.
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
            decay = decay.masked_fill(starts_BS[:, t, None, None], 0.0)
        state = decay[..., None] * state
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
    dtype = tokens.v.dtype
    chunks = _chunks(tokens.wide(), min(chunk, seq_len), dtype)
    states, last = states_before(chunks.maps, state, ranks, dtype)
    new = chunks.u - wide_product(chunks.w, states, dtype)
    o = wide_product(chunks.q, states, dtype) + wide_product(chunks.scores, new, dtype)
    return joined(o, seq_len).to(dtype), last  # from [C, B, N, L, V]


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


def _chunks(tokens: DeltaTokens, size: int, dtype: torch.dtype) -> _Chunks:
    """``dtype``: the factors of matmuls are rounded to it (wide_product.py)."""
    q, k, v, log_decay = (split(x, size) for x in tokens[:4])
    beta = split(tokens.beta[..., None], size)  # [C, B, N, L, 1]
    log_g, g_i, g_last, kept = decays(log_decay, tokens.starts_BS)

    # The solver reads below the diagonal. It gives the inverse. With L columns this takes a quarter
    # of the time of a solution for all columns of U and W, which are then one matmul.
    system = beta * _decayed_products(k, k, log_g, kept, dtype)
    one = torch.eye(system.shape[-1], dtype=k.dtype, device=k.device).expand_as(system)
    inverse = torch.linalg.solve_triangular(system, one, upper=False, unitriangular=True)
    right = beta * torch.cat([v, g_i * k], dim=-1)
    u, w = wide_product(inverse, right, dtype).split([v.shape[-1], k.shape[-1]], dim=-1)

    k_last = (g_last * k).mT
    # A decay for each channel, also where they are equal: the gradient of one number is a sum over
    # K and V, and the kernel of all such sums does not compile with torch 2.11's Triton.
    decay = g_i[..., -1, :, None].expand(*g_i.shape[:-2], k.shape[-1], 1).contiguous()
    maps = Maps(decay, -wide_product(k_last, w, dtype), wide_product(k_last, u, dtype))
    return _Chunks(g_i * q, _decayed_products(q, k, log_g, kept, dtype), u, w, maps)


def _decayed_products(
    x: Tensor, k: Tensor, log_g: Tensor, kept: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return (x_i . k_j) (G_i / G_j) where ``kept``, else 0: ``[..., L, L]``.

    If each channel has its own G, the quotient is inside of the sum over channels. A block of rows
    takes G relative to its first row: then both factors, G_i / G_first and G_first / G_j, are at
    most 1 for earlier columns j. Only the blocks on the diagonal need all the quotients."""
    if log_g.shape[-1] == 1:
        return wide_product(x, k.mT, dtype) * exp_or_zero(log_g - log_g.mT, ~kept)
    rows, size = [], x.shape[-2]
    for start in range(0, size, BLOCK):
        block = slice(start, min(start + BLOCK, size))
        log_i, first = log_g[..., block, :], log_g[..., start : start + 1, :]
        k_before = k[..., :start, :] * (first - log_g[..., :start, :]).exp()
        x_first = x[..., block, :] * (log_i - first).exp()
        before = wide_product(x_first, k_before.mT, dtype)
        pairs = log_i[..., :, None, :] - log_i[..., None, :, :]
        later = torch.ones(pairs.shape[-3:-1], dtype=torch.bool, device=x.device).triu(1)
        products = x[..., block, None, :] * k[..., None, block, :]
        own = (products * exp_or_zero(pairs, later[..., None])).sum(-1)
        rows.append(F.pad(torch.cat([before, own], dim=-1), (0, size - block.stop)))
    return torch.cat(rows, dim=-2).masked_fill(~kept, 0.0)
