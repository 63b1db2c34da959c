"""Token order of a batch: the tokens of each row that a rank holds.

Tensors are token-major, ``[T]``. Every sharding of tokens splits T into equal contiguous shards.
Context parallelism shards each *row*. So a batch is ordered such that sharding T over
(dp_replicate, dp, cp) gives every cp rank its shard of all its rows. The order is: per data rank,
shard by shard, and inside a shard row by row. With cp=1 the rows follow one another.

The choice of tokens for each shard is independent of this. Under a causal mask a token has as many
keys as there are tokens before it. So with contiguous shards the last shard has the most
work. *Zig-zag* splits the row into 2 * cp chunks and gives rank r the chunks r and 2 * cp - 1 - r,
an early and a late one. Then all ranks have the same work (as in Llama 3, arXiv:2407.21783, section
3.3.2). Zig-zag is only a permutation. A token's target and position are permuted in the same way,
the loss is a sum, and no layer except the mixer of a block depends on the order of tokens: see
``Mixer.orders`` in mixer.py.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dtron.errors import UserError
from dtron.mesh import Layout

TokenOrder = Literal["zigzag", "contiguous"]


def row_order(seq_len: int, parts: int, zigzag: bool, device: torch.device | str = "cpu") -> Tensor:
    """Return ``[S]``: the places of a row's tokens in the order of the row's shards. Inside a shard
    the places increase. So the mask between a shard and itself is the plain causal mask. Raises
    UserError if zig-zag cannot split the row into 2 * parts equal chunks."""
    if not zigzag or parts == 1:
        return torch.arange(seq_len, device=device)
    if seq_len % (2 * parts):
        raise UserError(
            f"sequence {seq_len}: zigzag over cp={parts} wants a multiple of {2 * parts}; use "
            "--zigzag off"
        )
    # Chunk p, then chunk 2n - 1 - p. Computed by arithmetic: the compiler puts this into flex's
    # kernels, which take no concatenated tensors.
    place_S, half = torch.arange(seq_len, device=device), seq_len // parts // 2
    part_S, within_S = place_S // (2 * half), place_S % (2 * half)
    chunk_S = torch.where(within_S < half, part_S, 2 * parts - 1 - part_S)
    return chunk_S * half + within_S % half


def as_tokens(x_BS: Tensor, layout: Layout, zigzag: bool) -> Tensor:
    """Convert ``[B, S, ...]`` to ``[T, ...]`` in the batch's token order, for any number of further
    dims. The result is not sharded yet."""
    data, parts = layout.parts("rows"), layout.parts("sequence")
    if parts == 1:
        return x_BS.flatten(0, 1)
    x_BS = x_BS[:, row_order(x_BS.shape[1], parts, zigzag, x_BS.device)]
    return x_BS.unflatten(1, (parts, -1)).unflatten(0, (data, -1)).transpose(1, 2).flatten(0, 3)


def as_rows(x_T: Tensor, layout: Layout, seq_len: int, zigzag: bool) -> Tensor:
    """Undo ``as_tokens``, for any number of further dims: ``[T, ...]`` -> ``[B, S, ...]``."""
    data, parts = layout.parts("rows"), layout.parts("sequence")
    if parts == 1:
        return x_T.unflatten(0, (-1, seq_len))
    shards = x_T.unflatten(0, (data, parts, -1, seq_len // parts))
    x_BS = shards.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return x_BS[:, row_order(seq_len, parts, zigzag, x_T.device).argsort()]
