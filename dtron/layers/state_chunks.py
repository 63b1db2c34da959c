"""The chunks of a recurrence with decays: gated delta rule (delta_rule.py) and SSD (ssd.py).

Both cut a sequence into chunks of L tokens. With G_i the product of the decays up to token i of the
chunk, a token needs three kinds of quotients: G_i for the state before the chunk, G_i / G_j for an
earlier token j of the chunk, and G_L / G_j for the state after the chunk. They are computed as
exp(log G_i - log G_j), which never exceeds 1.

**Documents.** The state must be zero at the first token of a document. A decay of zero has no
logarithm. So a quotient G_i / G_j, with j before the document of i, is set to zero instead; the
same for G_i and for G_L / G_j.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Decays(NamedTuple):
    """The decays within chunks, ``[C, B, N, ...]``.

    ``log_g``: log G_i, ``[..., L, 1]``, or ``[..., L, K]`` with a decay for each channel.
    ``g_i``: G_i, or 0 if a document starts up to token i.
    ``g_last``: G_L / G_j, or 0 if a document starts after token j.
    ``kept``: whether token i reads token j: j <= i in the same document, ``[..., L, L]``."""

    log_g: Tensor
    g_i: Tensor
    g_last: Tensor
    kept: Tensor


def decays(log_decay: Tensor, starts_BS: Tensor | None) -> Decays:
    """Compute the decays within chunks.

    ``log_decay``: ``[C, B, N, L, 1]`` or ``[C, B, N, L, K]``.
    ``starts_BS``: whether a token is the first one of its document (None: no token is)."""
    size, log_g = log_decay.shape[-2], log_decay.cumsum(-2)
    kept = torch.ones(size, size, dtype=torch.bool, device=log_g.device).tril()  # j <= i
    before, after = None, None
    if starts_BS is not None:
        starts = split(starts_BS[..., None, None].to(log_g.dtype), size)
        document = starts.cumsum(-2)  # [C, B, 1, L, 1]; 0 is the document of the state before
        kept = kept & (document == document.mT)
        before, after = document != 0, document != document[..., -1:, :]
    g_i = exp_or_zero(log_g, before)
    return Decays(log_g, g_i, exp_or_zero(log_g[..., -1:, :] - log_g, after), kept)


def exp_or_zero(x: Tensor, zero: Tensor | None) -> Tensor:
    """Return exp(x), and 0 with gradient 0 where ``zero``."""
    return (x if zero is None else x.masked_fill(zero, float("-inf"))).exp()


def split(x: Tensor, size: int) -> Tensor:
    """Split rows into chunks: ``[B, S, N, H]`` -> ``[C, B, N, L, H]``. The last chunk is padded
    with zeros: such a token changes no state, because its log decay is 0 and it adds nothing."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size))
    return x.unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4)


def joined(x: Tensor, seq_len: int) -> Tensor:
    """Undo ``split``: ``[C, B, N, L, H]`` -> ``[B, S, N, H]``."""
    return x.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :seq_len]
