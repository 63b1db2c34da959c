"""Which tokens of a row a rank has: the order in which a batch lies.

Tokens are token-major, ``[T]``, and every cut of them is a cut of T into equal parts, one after the
other. Context parallelism cuts each *row*. So a batch is laid in such an order that the cut of T
over (dp_replicate, dp, cp) gives every cp rank its part of all its rows: per data rank, part by
part, and within a part row by row. With cp=1 that is the rows one after the other.

Which tokens the parts are is a choice of its own. Under a causal mask a token has as many keys as
there are tokens before it, so of contiguous parts the last has nearly all the work. *Zig-zag* cuts
the row into 2 * cp chunks and gives rank r the chunks r and 2 * cp - 1 - r, an early and a late
one: all ranks then have the same work (as in Llama 3, arXiv:2407.21783, section 3.3.2). It is a
permutation and nothing else: what belongs to a token (its target, its position) is laid in the same
order, the loss is a sum, and no layer but attention asks which token stands beside which.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtron.errors import UserError
from dtron.mesh import Layout


def row_order(
    sequence: int, parts: int, zigzag: bool, device: torch.device | str = "cpu"
) -> Tensor:
    """``[S]``: the tokens of a row in the order in which its parts have them. Within a part it rises, so that
    a part's own mask is the plain causal one. Raises UserError for a row that is no 2 * parts equal
    chunks."""
    if not zigzag or parts == 1:
        return torch.arange(sequence, device=device)
    if sequence % (2 * parts):
        raise UserError(
            f"sequence {sequence}: zigzag over cp={parts} wants a multiple of {2 * parts}; use --zigzag off"
        )
    # Chunk p, then chunk 2n - 1 - p. By arithmetic: the compiler puts this into flex's kernels,
    # which take no tensors laid end to end.
    place_S, half = torch.arange(sequence, device=device), sequence // parts // 2
    part_S, within_S = place_S // (2 * half), place_S % (2 * half)
    chunk_S = torch.where(within_S < half, part_S, 2 * parts - 1 - part_S)
    return chunk_S * half + within_S % half


def as_tokens(x_BS: Tensor, layout: Layout, zigzag: bool) -> Tensor:
    """``[B, S]`` -> ``[T]`` in the batch's order, still whole; and so with any number of further
    dims."""
    data, parts = layout.parts("rows"), layout.parts("sequence")
    if parts == 1:
        return x_BS.flatten(0, 1)
    x_BS = x_BS[:, row_order(x_BS.shape[1], parts, zigzag, x_BS.device)]
    return x_BS.unflatten(1, (parts, -1)).unflatten(0, (data, -1)).transpose(1, 2).flatten(0, 3)


def as_rows(x_T: Tensor, layout: Layout, sequence: int, zigzag: bool) -> Tensor:
    """Undo ``as_tokens``, of any number of further dims: ``[T, ...]`` -> ``[B, S, ...]``."""
    data, parts = layout.parts("rows"), layout.parts("sequence")
    if parts == 1:
        return x_T.unflatten(0, (-1, sequence))
    x_BS = (
        x_T.unflatten(0, (data, parts, -1, sequence // parts))
        .transpose(1, 2)
        .flatten(2, 3)
        .flatten(0, 1)
    )
    return x_BS[:, row_order(sequence, parts, zigzag, x_T.device).argsort()]
