"""Sums over the tokens of each sequence of a microbatch, on any mesh.

A sequence is a document of a packed row. A data rank has a *slot* for each document that its rows
could have, so shapes do not depend on the data. Documents 2k and 2k + 1 of a row are a pair, such
as a chosen and a rejected answer. A pair is in one row, so it is always in one microbatch and on
one data rank. cp shards a row: the sums of the shards are added by one all-reduce over cp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dtron.layers.cross_entropy import IGNORE
from dtron.mesh import Layout


def slots_per_row(seq_len: int) -> int:
    """Return the number of slots of a row: even, so that no pair is in two rows."""
    return 2 * (seq_len // 2 + 1)


def slots_of(documents_BS: Tensor, rows_per_rank: int) -> Tensor:
    """Return the slot of each token's sequence on its data rank, ``[B, S]``.

    ``documents_BS``: the number of each token's document in its row."""
    b, s = documents_BS.shape
    rows_B = torch.arange(b, device=documents_BS.device) % rows_per_rank
    return documents_BS + slots_per_row(s) * rows_B[:, None]


def count_pairs(documents_BS: Tensor, counted_BS: Tensor) -> int:
    """Count the pairs of a global batch: both of their sequences have a target that counts.

    ``counted_BS``: whether each target counts."""
    b, s = documents_BS.shape
    counts = torch.zeros(b * slots_per_row(s), dtype=torch.long)
    counts.index_add_(0, slots_of(documents_BS, b).flatten(), counted_BS.flatten().long())
    return int((counts.view(-1, 2) > 0).all(-1).sum())


def sequence_sums(
    log_probs_T: Tensor, targets_T: Tensor, sequences_T: Tensor, slots: int, layout: Layout
) -> Tensor:
    """Return ``[2, slots]``: for each slot, the sum of the log-probabilities of its tokens, and the
    number of its targets that count. Inside a local region, with the tensors of this rank; every
    rank of cp gets the sums of whole sequences."""
    columns = torch.stack([log_probs_T, (targets_T != IGNORE).to(log_probs_T.dtype)])
    own = torch.zeros(2, slots, dtype=columns.dtype, device=columns.device)
    return _SumOverShards.apply(own.index_add(1, sequences_T, columns), layout)


def summand(x: Tensor, layout: Layout) -> Tensor:
    """Return a scalar that every rank of cp has as a summand of a pending sum over cp. The
    gradient of the scalar is that of the sum: ``sequence_sums`` gives each rank its own tokens'
    part of it."""
    n = layout.parts("sequence")
    return x + (x.detach() / n - x.detach())


class _SumOverShards(torch.autograd.Function):
    """All-reduce over the shards of a sequence. All ranks of cp compute the same loss of the sum,
    so each has the whole gradient already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        return layout.all_reduce(x, "sequence") + 0  # a new tensor where there is one shard

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None
