"""Dispatch: send tokens to their experts and combine the experts' outputs.

Each of T tokens goes to K experts. These T * K (token, expert) pairs are the *slots*. Their rows in
a buffer that is sorted by expert are a ``TokenPermutation`` (permutation.py).

There are four dispatchers with one signature:
``(x_TD, weights_TK, index_TK, first, run, experts) -> (y_TD, dropped)``.

``first``: the index of the first expert on this rank.
``run``: computes the experts of this rank, on rows sorted by expert.
``experts``: the number of experts, and the ranks that they are sharded over.

The dispatchers differ in their communication over ep and in their shapes:

    local        ep = 1: no communication; T * K rows.
    alltoall     Sends rows to the ranks of their experts, and back. The number of rows depends on
                 the data, so the host waits for this number. Two all-to-alls of rows and one of E
                 counts. Not compiled.
    static       Like alltoall, with a fixed number of rows per expert and source rank, filled or
                 not: ``capacity_factor`` times the mean. Two all-to-alls. Slots beyond are dropped,
                 smallest weights first. With room for every token, no slot is dropped.
    allgather    Every rank all-gathers the tokens of its group and computes the rows of its own
                 experts. A reduce-scatter sums the outputs. Sends less than an all-to-all where
                 ep < K. But the buffers have room for the slots of all ranks.

``static`` and ``allgather`` never wait for the host and compile without graph breaks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dtron.distributed.collectives import all_gather, all_to_all, reduce_scatter
from dtron.moe.permutation import (
    TokenPermutation,
    by_expert,
    by_room,
    permute,
    permuted,
    unpermute,
)
from dtron.torch_compile import tracing

Dispatch = Literal["auto", "alltoall", "static", "allgather"]
RunExperts = Callable[[Tensor, Tensor | None], Tensor]  # experts.compute on this rank's experts
Combined = tuple[Tensor, Tensor | None]  # y_TD, number of dropped slots (None: cannot drop)


@dataclass(frozen=True)
class ExpertGroup:
    """Number of experts, their ranks, and their capacity.

    ``total``: the number of experts on all ranks.
    ``ranks``: the ranks that the experts are sharded over (None: all experts are on this rank).
    ``capacity_factor``: rows per expert, as a multiple of the mean load (0: room for all tokens).
    ``scores_on_inputs``: a token's scores multiply its rows, not the experts' outputs.
    ``all_sent``: every slot has an expert. Otherwise the expert of a slot that is not sent is
        ``total``, and its output is zero."""

    total: int
    ranks: DeviceMesh | None
    capacity_factor: float = 0.0
    scores_on_inputs: bool = False
    all_sent: bool = True

    @property
    def parts(self) -> int:
        """The number of ranks that the experts are sharded over."""
        return 1 if self.ranks is None else self.ranks.size()

    @property
    def per_rank(self) -> int:
        """The number of experts on each rank."""
        return self.total // self.parts

    def sent(self, index_TK: Tensor) -> Tensor | None:
        """Return whether each slot is sent, ``[T * K]`` (None: all are)."""
        return None if self.all_sent else index_TK.flatten() < self.total


def _rows(
    x_TD: Tensor, weights_TK: Tensor, permutation: TokenPermutation, experts: ExpertGroup
) -> Tensor:
    """Return the inputs of the experts: a row for each slot."""
    rows = permute(x_TD, permutation)
    if not experts.scores_on_inputs:
        return rows
    return (rows * permute(weights_TK.reshape(-1, 1), permutation)).to(rows.dtype)


def _combined(
    y_RD: Tensor, weights_TK: Tensor, permutation: TokenPermutation, experts: ExpertGroup
) -> Tensor:
    """Sum the outputs of each token's experts."""
    weights_TK = torch.ones_like(weights_TK) if experts.scores_on_inputs else weights_TK
    return unpermute(y_RD, weights_TK, permutation)


def local(
    x_TD: Tensor,
    weights_TK: Tensor,
    index_TK: Tensor,
    first: Tensor,
    run: RunExperts,
    experts: ExpertGroup,
) -> Combined:
    """Compute without communication."""
    permutation, ends_E = by_expert(index_TK.flatten(), experts.total, experts.sent(index_TK))
    return _combined(
        run(_rows(x_TD, weights_TK, permutation, experts), ends_E), weights_TK, permutation, experts
    ), None


def alltoall(
    x_TD: Tensor,
    weights_TK: Tensor,
    index_TK: Tensor,
    first: Tensor,
    run: RunExperts,
    experts: ExpertGroup,
) -> Combined:
    """Send a number of rows that depends on the data, over ep."""
    assert experts.ranks is not None  # choose_dispatcher: one rank needs no sends
    permutation, ends_E = by_expert(index_TK.flatten(), experts.total, experts.sent(index_TK))
    counts_RE = ends_E.diff(prepend=ends_E.new_zeros(1)).view(experts.parts, experts.per_rank)
    received_RE = all_to_all(counts_RE, experts.ranks)  # rows from each rank per local expert
    sent, received = counts_RE.sum(1).tolist(), received_RE.sum(1).tolist()  # the host waits
    rows = _rows(x_TD, weights_TK, permutation, experts)
    rows = rows if experts.all_sent else rows[: sum(sent)]
    rows = all_to_all(rows, experts.ranks, received, sent)
    own = torch.arange(experts.per_rank, device=rows.device).repeat(experts.parts)
    mine, ends_E = by_expert(own.repeat_interleave(received_RE.flatten()), experts.per_rank)
    y = run(permuted(rows, mine.slot_R, mine.place_S), ends_E)
    y = all_to_all(permuted(y, mine.place_S, mine.slot_R), experts.ranks, sent, received)
    if not experts.all_sent:
        y = F.pad(y, (0, 0, 0, index_TK.numel() - sum(sent)))  # a row for each slot again
    return _combined(y, weights_TK, permutation, experts), None


def static(
    x_TD: Tensor,
    weights_TK: Tensor,
    index_TK: Tensor,
    first: Tensor,
    run: RunExperts,
    experts: ExpertGroup,
) -> Combined:
    """Send a fixed number of rows to each expert, over ep."""
    tokens, k = index_TK.shape
    sent_S = index_TK.flatten() < experts.total
    room, limit = tokens, None  # a token goes to an expert at most once
    if experts.capacity_factor:
        room = min(tokens, math.ceil(experts.capacity_factor * (tokens * k) / experts.total))
        # The limit is a share of the sent slots. The buffer has one size, however many are sent.
        limit = torch.ceil(experts.capacity_factor * sent_S.sum().double() / experts.total)
    weights_S = weights_TK.detach().flatten()
    permutation = by_room(index_TK.flatten(), weights_S, experts.total, room, limit)
    rows = _rows(x_TD, weights_TK, permutation, experts)  # [E * room, D]
    if experts.ranks is not None:
        rows = all_to_all(rows, experts.ranks)
    rows = rows.view(experts.parts, experts.per_rank, room, -1).transpose(0, 1).flatten(1, 2)
    y = run(rows, None)
    y = y.unflatten(1, (experts.parts, room)).transpose(0, 1).flatten(0, 2)
    if experts.ranks is not None:
        y = all_to_all(y.contiguous(), experts.ranks)
    assert permutation.kept_S is not None  # by_room gives it
    return _combined(y, weights_TK, permutation, experts), (sent_S & ~permutation.kept_S).sum()


def allgather(
    x_TD: Tensor,
    weights_TK: Tensor,
    index_TK: Tensor,
    first: Tensor,
    run: RunExperts,
    experts: ExpertGroup,
) -> Combined:
    """All-gather the tokens over ep."""
    assert experts.ranks is not None  # choose_dispatcher: one rank needs no sends
    x_TD, weights_TK, index_TK = (
        all_gather(t, experts.ranks) for t in (x_TD, weights_TK, index_TK)
    )
    own_S = index_TK.flatten() - first
    kept_S = (own_S >= 0) & (own_S < experts.per_rank)
    permutation, ends_E = by_expert(
        torch.where(kept_S, own_S, experts.per_rank), experts.per_rank, kept_S
    )
    y_TD = _combined(
        run(_rows(x_TD, weights_TK, permutation, experts), ends_E), weights_TK, permutation, experts
    )
    return reduce_scatter(y_TD, experts.ranks), None


DISPATCHERS = {"local": local, "alltoall": alltoall, "static": static, "allgather": allgather}


def choose_dispatcher(dispatch: Dispatch, experts: ExpertGroup) -> Callable:
    """Return the dispatcher for a setting."""
    if experts.capacity_factor or dispatch == "static":
        return static
    if experts.ranks is None:
        return local
    if dispatch == "auto":
        return allgather if tracing() else alltoall
    return DISPATCHERS[dispatch]
