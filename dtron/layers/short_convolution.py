"""A causal depthwise convolution over a few tokens, as layers with a recurrent state have it.

Each channel is convolved by itself, over a token and the ``width - 1`` tokens before it:

    y_t = sum over k of taps[k] * x_(t - k)

Linear attention and state space models mix the nearest tokens in this way before their recurrence
(Gu & Dao 2023, arXiv:2312.00752, section 3.4; Yang et al. 2024, arXiv:2412.06464, figure 1).

A token must not see another document. ``sees_TK`` says which of the preceding tokens it sees. Its
column 1 also says where documents start: the first token of a document does not see the token
before it. A rank of context parallelism has a contiguous shard of each row. It needs the last
tokens of the shard before its own (``halo``), a number of bytes that does not depend on the
sequence length. In generation these tokens are the tail that the decoding cache keeps.

Left out: torch's conv1d. A product for each tap takes the mask of documents, and a compiler fuses
the products into one kernel.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dtron.distributed.collectives import ring_shift
from dtron.layers.mixer import TokenData
from dtron.mesh import Layout
from dtron.params import Dims, WeightSpec


def taps_init(w: WeightSpec, dims: Dims, generator: torch.Generator) -> Tensor:
    """Draw taps ``[width, ...]`` uniformly from -1 / sqrt(width) to 1 / sqrt(width), as torch's
    conv1d does."""
    bound = w.shape[0] ** -0.5
    return torch.empty(w.shape, device=generator.device).uniform_(
        -bound, bound, generator=generator
    )


def short_convolution(
    x_BSC: Tensor, taps_KC: Tensor, before_BKC: Tensor, sees_BSK: Tensor | None
) -> Tensor:
    """Convolve: ``[B, S, C]`` -> the same shape. Rank-local.

    ``taps_KC``: ``taps_KC[k]`` is multiplied with the token k places before.
    ``before_BKC``: the ``width - 1`` tokens before each row, or before a rank's shard of each row.
    ``sees_BSK``: whether a token sees the token k places before (None: it sees them all)."""
    width, seq_len = len(taps_KC), x_BSC.shape[1]
    x = torch.cat([before_BKC, x_BSC], dim=1)
    y = torch.zeros_like(x_BSC)
    for k in range(width):
        back = x[:, width - 1 - k : width - 1 - k + seq_len]
        y = y + taps_KC[k] * (back if sees_BSK is None else back * sees_BSK[..., k, None])
    return y


def halo(x_BSC: Tensor, width: int, layout: Layout) -> Tensor:
    """Return the ``width - 1`` tokens before a rank's shard of each row, from the previous cp rank.
    The first rank receives those of the last one, which ``sees_TK`` hides. Without cp they are
    zeros. Inside a local region; differentiable."""
    ranks = layout.group("cp")
    if ranks is None:
        return x_BSC.new_zeros(len(x_BSC), width - 1, x_BSC.shape[2])
    return ring_shift(x_BSC[:, x_BSC.shape[1] - (width - 1) :], ranks)


def update_tail(x_BSC: Tensor, tail_BKC: Tensor, last_B: Tensor) -> None:
    """Write the last ``width - 1`` tokens of each row into the tail, in place.

    ``last_B``: the index of each row's last new token. Later tokens are padding."""
    x, count = torch.cat([tail_BKC, x_BSC], dim=1), tail_BKC.shape[1]
    rows = torch.arange(len(x), device=x.device)[:, None]
    tail_BKC.copy_(x[rows, last_B[:, None] + 1 + torch.arange(count, device=x.device)])


def visible_tokens(batch: TokenData, width: int, device: torch.device, layout: Layout) -> Tensor:
    """Return ``sees_TK [T@tokens, width]``: whether a token sees the token k places before. Rows
    must be in contiguous order. Communicates nothing."""
    documents_T, parts = batch.documents_T, layout.parts("sequence")
    if documents_T is None:
        whole_T = torch.zeros(batch.positions_T.shape, dtype=torch.long, device=device)
        documents_T = layout.shard(whole_T, "rows")
    core = partial(same_document, width=width, seq_len=batch.seq_len, parts=parts)
    region = layout.local_map(core, (("rows",), ("sequence",)), ("tokens", None))
    return region(documents_T, layout.iota("sequence", parts, device))


def same_document(
    documents_T: Tensor, part: Tensor, width: int, seq_len: int, parts: int
) -> Tensor:
    """Compute ``sees_TK`` of the ``part``-th shard of each row. Rank-local.

    ``documents_T``: the documents of whole rows."""
    documents = documents_T.unflatten(0, (-1, seq_len))
    before = F.pad(documents, (width - 1, 0), value=-1)
    sees = [before[:, width - 1 - k : width - 1 - k + seq_len] == documents for k in range(width)]
    return torch.stack(sees, dim=-1).unflatten(1, (parts, -1))[:, part].flatten(0, 2)
