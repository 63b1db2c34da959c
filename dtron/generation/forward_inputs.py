"""The tensors of one forward of generation, made on the host from the pieces of a step.

Their shapes come from a small set. Decode has one token in every row of the batch, also in rows
without a text. Prefill has some rows of each pool, and chunks whose length is a power of two, as
the number of pages of the block tables is. So a forward of a kind can be recorded once and
replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from dtron.generation.scheduler import Piece, Scheduler


@dataclass(frozen=True)
class ForwardInputs:
    """The inputs of one forward. All ranks have the same ones. A row without a piece is padding:
    its tables name the null page, and it changes no state.

    ``tokens_BS``: the tokens, and one more for each row: a batch has a target for its last token.
    ``positions_BS``: their positions; 0 for padding.
    ``counted_BS``: whether a token is no padding.
    ``slots_BS``: their slots in the KV cache.
    ``last_B``: the index of the last token of each row; -1: the row is padding.
    ``table_BP``: the block tables.
    ``places_B``: the place of each row's recurrent state in its pool (None: all rows, in order).
    ``fresh_B``: whether a row starts with an empty state; given with ``places_B``.
    ``all_fresh``: whether no row has earlier tokens."""

    tokens_BS: Tensor
    positions_BS: Tensor
    counted_BS: Tensor
    slots_BS: Tensor
    last_B: Tensor
    table_BP: Tensor
    places_B: Tensor | None = None
    fresh_B: Tensor | None = None
    all_fresh: bool = False

    def to(self, device: str) -> ForwardInputs:
        """Return the same inputs on another device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: Any = {k: x.to(device) for k, x in tensors.items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    def tensors(self) -> list[Tensor | None]:
        """Return the tensors, in the order of the fields."""
        return [getattr(self, f.name) for f in fields(self) if f.name != "all_fresh"]


def decode_inputs(
    scheduler: Scheduler, pieces: Sequence[Piece], width: int | None = None
) -> ForwardInputs:
    """Return the inputs of a decode: one token in each row.

    ``width``: the number of pages of the block tables (None: a power of two that suffices)."""
    by_row = {piece.request.row: piece for piece in pieces}
    rows = [by_row.get(row) for row in range(len(scheduler.rows))]
    return _inputs(rows, 1, scheduler.size.page, width)


def prefill_inputs(
    scheduler: Scheduler, pieces: Sequence[Piece], tp: int
) -> tuple[ForwardInputs, list[int]]:
    """Return the inputs of a prefill, and the row of each piece. Each pool has the same number of
    rows.

    ``tp``: the number of ranks that share the tokens of a row; it divides the length of a chunk."""
    pools = scheduler.places(pieces)
    height = power_of_two(max(map(len, pools)))
    scratch = len(scheduler.rows) // len(pools)  # the place of a state that nobody reads
    rows: list[Piece | None] = []
    places: list[int] = []
    for pool in pools:
        fill = height - len(pool)
        rows += [*(piece for _, piece in pool), *[None] * fill]
        places += [*(place for place, _ in pool), *[scratch] * fill]
    longest = power_of_two(max(piece.count for piece in pieces))
    inputs = _inputs(rows, -(-longest // tp) * tp, scheduler.size.page)
    fresh = [piece is not None and piece.request.cached == 0 for piece in rows]
    all_fresh = sum(fresh) == len(pieces)
    index = {id(piece): i for i, piece in enumerate(rows)}
    states: Any = {"places_B": torch.tensor(places), "fresh_B": torch.tensor(fresh)}
    return replace(inputs, **states, all_fresh=all_fresh), [index[id(piece)] for piece in pieces]


def _inputs(
    rows: Sequence[Piece | None], seq_len: int, page: int, width: int | None = None
) -> ForwardInputs:
    """Return the inputs that all forwards have."""
    starts = torch.tensor([0 if p is None else p.request.cached for p in rows])
    counts = torch.tensor([0 if p is None else p.count for p in rows])
    new = [[] if p is None else p.request.text[p.request.cached :][: p.count] for p in rows]
    pages = [() if p is None else p.request.pages for p in rows]
    tokens = _padded(new, seq_len + 1)
    table = _padded(pages, width or power_of_two(max(map(len, pages))))
    counted = torch.arange(seq_len) < counts[:, None]
    positions = (starts[:, None] + torch.arange(seq_len)) * counted
    slots = table.gather(1, positions // page) * page + positions % page
    return ForwardInputs(tokens, positions, counted, slots * counted, counts - 1, table)


def _padded(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    """Return a tensor of rows that are padded with 0. One tensor is made: the host makes the inputs
    of a decode while the GPU waits."""
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
