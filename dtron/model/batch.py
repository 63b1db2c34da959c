"""A microbatch: the input of the model's stages, and each rank's shard of it.

Tensors are token-major, because two sharded dims cannot be flattened. A target is the next token.
All token data, above all positions and documents, is part of the batch. So no layer depends on the
order of the tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dtron.layers.cross_entropy import IGNORE
from dtron.layers.token_order import as_tokens
from dtron.losses.objective import LossInputs
from dtron.losses.sequence_sums import slots_of, slots_per_row
from dtron.mesh import Layout
from dtron.model.mtp import look_ahead


@dataclass(frozen=True)
class Batch:
    """A microbatch, token-major: rows of ``seq_len`` tokens, concatenated unless cp shards them
    (see layers/token_order.py).

    ``tokens_T``, ``targets_T``, ``positions_T``: ``[T@tokens]`` each. A target is the next
        token, or IGNORE.
    ``rows_T``: ``[T@tokens]``, the row of each token.
    ``documents_T``: ``[T@rows]``, the document of each token, whole rows, always concatenated;
        None if each row is one document.
    ``tokens_TA``, ``targets_TA``: ``[T@tokens, depth]``, inputs and targets of multi-token
        prediction; None without it.
    ``needed_T``: ``[T@tokens]``, whether a target that counts is at the token or later in its row.
        Other tokens are padding: no loss depends on them. None if it was not requested.
    ``sequences_T``: ``[T@tokens]``, the slot of each token's sequence (losses/sequence_sums.py);
        None if the loss does not depend on whole sequences.
    ``reference``: what a second model has computed for the loss (``Objective.reference``)."""

    tokens_T: Tensor
    targets_T: Tensor
    positions_T: Tensor
    rows_T: Tensor
    documents_T: Tensor | None
    seq_len: int
    zigzag: bool
    tokens_TA: Tensor | None = None
    targets_TA: Tensor | None = None
    needed_T: Tensor | None = None
    sequences_T: Tensor | None = None
    reference: tuple[Any, ...] = ()

    def loss_inputs(self, layout: Layout) -> LossInputs:
        """Return what a loss takes of this microbatch."""
        rows = self.targets_T.shape[0] // self.seq_len // layout.parts("rows")
        slots = 0 if self.sequences_T is None else rows * slots_per_row(self.seq_len)
        return LossInputs(self.targets_T, self.sequences_T, slots, self.reference)


def make_batch(
    rows_BS: Tensor,
    layout: Layout,
    documents_BS: Tensor | None = None,
    positions_BS: Tensor | None = None,
    counted_BS: Tensor | None = None,
    depth: int = 0,
    zigzag: bool = True,
    needed: bool = False,
    sequences: bool = False,
) -> Batch:
    """Make a microbatch. Every rank passes the same rows and keeps its own shard.

    ``rows_BS``: rows of seq_len + 1 tokens. Inputs are the first ``seq_len`` tokens, targets
        the last ``seq_len`` tokens, which may already contain IGNORE.
    ``counted_BS``: whether a target is in the loss (None: all are).
    ``depth``: number of multi-token-prediction modules, whose inputs and targets are shifted
        further.
    ``zigzag``: the order of each rank's tokens over cp; False: contiguous.
    ``needed``, ``sequences``: whether to make ``needed_T`` and ``sequences_T``."""
    tokens, targets = rows_BS[:, :-1].clamp(min=0), rows_BS[:, 1:]
    if counted_BS is not None:
        targets = targets.masked_fill(~counted_BS, IGNORE)
    b, s = tokens.shape
    if positions_BS is None:
        positions_BS = torch.arange(s, device=rows_BS.device).repeat(b, 1)
    rows = torch.arange(b, device=rows_BS.device)[:, None].expand(b, s)

    def own_tokens(x_BS: Tensor) -> Tensor:
        return layout.shard(as_tokens(x_BS, layout, zigzag), "tokens")

    documents = None if documents_BS is None else layout.shard(documents_BS.flatten(), "rows")
    t, u, p, r = (own_tokens(x_BS) for x_BS in (tokens, targets, positions_BS, rows))
    batch = Batch(t, u, p, r, documents, s, zigzag)
    if depth:
        more, further = map(own_tokens, look_ahead(tokens, targets, depth, documents_BS))
        batch = replace(batch, tokens_TA=more, targets_TA=further)
    if sequences:
        row_documents_BS = torch.zeros_like(tokens) if documents_BS is None else documents_BS
        slots_BS = slots_of(row_documents_BS, b // layout.parts("rows"))
        batch = replace(batch, sequences_T=own_tokens(slots_BS))
    if not needed:
        return batch
    later_BS = (targets != IGNORE).flip(1).cumsum(1).flip(1)  # valid targets from here on
    return replace(batch, needed_T=own_tokens(later_BS > 0))


def valid_tokens(rows_BS: Tensor) -> int:
    """Count the targets of these rows that are in the loss."""
    return int((rows_BS[:, 1:] != IGNORE).sum())
