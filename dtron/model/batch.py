"""A microbatch: what the stages of a model are given, and what of it each rank has.

Token-major, because two dims that are both cut cannot be flattened; a target is the next token.
Everything about tokens travels as data, positions and documents above all: so no layer knows in
which order they stand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dtron.layers.cross_entropy import IGNORE
from dtron.layers.token_order import as_tokens
from dtron.mesh import Layout
from dtron.model.mtp import look_ahead


@dataclass(frozen=True)
class Batch:
    """A microbatch, token-major: rows of ``sequence`` tokens, ``[T@tokens]`` each, one after the
    other unless cp cuts them (see layers/token_order.py). A target is the next token, or IGNORE;
    ``rows_T`` is the row of a token. ``documents_T [T@rows]`` are whole rows, always one after the
    other, or None where a row is one document. ``tokens_TA`` and ``targets_TA [T@tokens, depth]``
    are those further ahead, for multi-token prediction; None: without it."""

    tokens_T: Tensor
    targets_T: Tensor
    positions_T: Tensor
    rows_T: Tensor
    documents_T: Tensor | None
    sequence: int
    zigzag: bool
    tokens_TA: Tensor | None = None
    targets_TA: Tensor | None = None


def make_batch(
    rows_BS: Tensor,
    layout: Layout,
    documents_BS: Tensor | None = None,
    positions_BS: Tensor | None = None,
    counted_BS: Tensor | None = None,
    depth: int = 0,
    zigzag: bool = True,
) -> Batch:
    """From rows of sequence + 1 tokens (or targets already IGNOREd in the last ``sequence``):
    inputs and, shifted by one, targets, of which those that ``counted_BS`` (None: all) says are in
    the loss; and for ``depth`` modules of multi-token prediction, shifted further. Every rank
    passes the same rows and keeps its own: over cp, parts of them, in ``zigzag`` order or
    contiguous."""
    tokens, targets = rows_BS[:, :-1].clamp(min=0), rows_BS[:, 1:]
    if counted_BS is not None:
        targets = targets.masked_fill(~counted_BS, IGNORE)
    b, s = tokens.shape
    if positions_BS is None:
        positions_BS = torch.arange(s, device=rows_BS.device).repeat(b, 1)
    rows = torch.arange(b, device=rows_BS.device)[:, None].expand(b, s)
    ahead = look_ahead(tokens, targets, depth, documents_BS) if depth else (None, None)
    place = lambda t: None if t is None else layout.shard(as_tokens(t, layout, zigzag), "tokens")
    documents = None if documents_BS is None else layout.shard(documents_BS.flatten(), "rows")
    main = (place(t) for t in (tokens, targets, positions_BS, rows))
    return Batch(*main, documents, s, zigzag, *(place(t) for t in ahead))


def valid_tokens(rows_BS: Tensor) -> int:
    """How many targets of these rows count."""
    return int((rows_BS[:, 1:] != IGNORE).sum())
