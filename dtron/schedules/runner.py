"""The runner: executes any valid table, and knows no schedule by name.

A stage is a function ``stage(params, x, batch) -> (y, extra)``; the last one's y is the loss, and
any stage may add to what is minimised with ``extra.aux``, and say something of itself with
``extra.report``. F runs it and keeps the edges of autograd's graph that lead back from y and aux; B
is ``torch.autograd.grad`` along these; I and W are its halves (split_backward.py). Nothing touches
``.grad``. What a microbatch keeps in a stage is dropped at its B or W, so no more is ever alive
than ``peaks`` says of the table.

What must travel between ranks follows from the table too: an activation goes to the rank of the
next stage when its F has ended, a gradient to that of the stage before. How, is the links' affair
(links.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dtron.distributed.redistribute import shard_like
from dtron.schedules.p2p import Links
from dtron.schedules.split_backward import DeferredWeightGrad, backward, backward_input
from dtron.schedules.table import Action, Table


class StageOutput(NamedTuple):
    """What a stage gives besides y. ``aux``: a scalar that is minimised too, a sum over tokens like
    the loss (None: nothing). ``report``: numbers for people, by name, without gradients: sums over
    tokens that are added up over microbatches."""

    aux: Tensor | None
    report: dict[str, Tensor]


@dataclass(frozen=True)
class Program:
    """A model as functions of one stage's params. ``enter(params, batch) -> x`` makes what the
    first stage takes (token embeddings); ``stage(params, x, batch) -> (y, extra)`` is a stage, the
    last one's y a scalar loss, ``extra`` an ``StageOutput`` or None. ``splits`` is false where a
    backward can't be made in two halves, because the stage recomputes. ``carries``: a stage takes,
    as its last argument, the sum of its reports on the microbatches before, or None. ``hold`` makes
    of params what the functions take (None: they take the params as they are); see
    training/gradients.py."""

    enter: Callable[[Any, Any], Tensor]
    stage: Callable[..., tuple[Tensor, StageOutput | None]]
    splits: bool = True
    hold: Any = None
    carries: bool = False


@dataclass
class SavedForward:
    """What one microbatch keeps in one stage, from its F to its B or W."""

    x: Tensor
    ends: list[GradientEdge]  # of y and aux
    entered: Tensor | None  # the first stage's input, with its own graph
    later: DeferredWeightGrad | None = None


@dataclass
class PipelineResult:
    """``total``: the last stage's outputs, summed over microbatches; None where that stage is elsewhere.
    ``reports``: by stage, those here, likewise summed. ``peak``: the most activations that each rank here
    kept at once."""

    total: Tensor | None
    reports: dict[int, dict[str, Tensor]]
    peak: dict[int, int]


def run(
    t: Table,
    ranks: Sequence[int],
    program: Program,
    weights: Mapping[int, Any],
    flat: Mapping[int, Sequence[Tensor]],
    batches: Sequence[Any],
    links: Links,
    take: Callable[[int, int, list[Tensor | None]], None],
) -> PipelineResult:
    """Execute the rows of ``ranks``, and hand ``take(stage, microbatch, gradients)`` the gradients
    of each microbatch's loss. ``weights[stage]`` are a stage's params as its function wants them,
    ``flat[stage]`` the tensors among them to differentiate by."""
    kept: dict[tuple[int, int], SavedForward] = {}
    alive, peak = dict.fromkeys(ranks, 0), dict.fromkeys(ranks, 0)
    total, reports, units = None, {}, {}
    for rank, a in t.order:
        if rank not in alive:
            continue
        stage, m, last = a.stage, a.microbatch, a.stage == t.stages - 1
        if a.kind == "F":
            entered = program.enter(weights[stage], batches[m]) if stage == 0 else None
            x = (
                entered.detach() if stage == 0 else links.receive(Action("F", stage - 1, m))
            ).requires_grad_()
            before = (reports.get(stage),) if program.carries else ()
            args = (weights[stage], x, batches[m], *before)
            kept[stage, m], values, report = _forward(program.stage, entered, *args)
            y = values[0]
            if stage not in units:  # the gradient of what is minimised
                units[stage] = [_one(value) for value in (values if last else values[1:])]
            if report:
                reports[stage] = _sum(reports.get(stage), report)
            alive[rank] += 1
            peak[rank] = max(peak[rank], alive[rank])
            if last:
                total = y if total is None else total + y
            else:
                links.send(a, y)
            continue
        here = kept[stage, m]
        if a.kind != "W":
            gs = (
                units[stage] if last else [links.receive(*t.gradient_from(stage, m)), *units[stage]]
            )
            halves = backward_input if a.kind == "I" and program.splits else backward
            gx, here.later = halves(here.ends, here.x, flat[stage], gs)
            here.ends = None
            if stage:
                links.send(a, gx)
            else:
                here.later = _and_enter(
                    here.later, get_gradient_edge(here.entered), gx, flat[stage]
                )
        if a.kind != "I":
            take(stage, m, here.later())
            here.later = None
            del kept[stage, m]
            alive[rank] -= 1
    links.finish()
    return PipelineResult(total, reports, peak)


def _forward(
    stage: Callable, entered: Tensor | None, weights: Any, x: Tensor, *rest: Any
) -> tuple[SavedForward, list[Tensor], dict[str, Tensor]]:
    """What must be kept for backward; the values of y, and of aux if there is one; and the report.
    Nothing but the first holds on to activations."""
    y, extra = stage(weights, x, *rest)
    ends = [y] if extra is None or extra.aux is None else [y, extra.aux]
    kept = SavedForward(x, [get_gradient_edge(end) for end in ends], entered)
    return kept, [end.detach() for end in ends], {} if extra is None else extra.report


def _one(x: Tensor) -> Tensor:
    return shard_like(torch.ones((), dtype=x.dtype, device=x.device), x)


def _sum(total: dict[str, Tensor] | None, more: dict[str, Tensor]) -> dict[str, Tensor]:
    return more if total is None else {name: total[name] + x for name, x in more.items()}


@torch.no_grad()
def run_forward(
    t: Table,
    ranks: Sequence[int],
    program: Program,
    weights: Mapping[int, Any],
    batches: Sequence[Any],
    links: Links,
) -> Tensor | None:
    """A table of forwards: the last stage's outputs, summed; None where that stage is elsewhere."""
    total = None
    for rank, a in t.order:
        if rank not in ranks:
            continue
        stage, m = a.stage, a.microbatch
        x = (
            program.enter(weights[0], batches[m])
            if stage == 0
            else links.receive(Action("F", stage - 1, m))
        )
        y, _ = program.stage(weights[stage], x, batches[m])
        if stage == t.stages - 1:
            total = y if total is None else total + y
        else:
            links.send(a, y)
    links.finish()
    return total


def forward_table(t: Table, microbatches: int) -> Table:
    """Forwards only, of any number of microbatches, on the ranks of ``t``."""
    order = [Action("F", s, m) for m in range(microbatches) for s in range(t.stages)]
    rows = (tuple(a for a in order if t.rank_of[a.stage] == rank) for rank in range(len(t.rows)))
    return Table(f"forwards of {t.name}", t.stages, microbatches, tuple(rows))


def _and_enter(
    later: DeferredWeightGrad, entered: GradientEdge, gx: Tensor, weights: Sequence[Tensor]
) -> DeferredWeightGrad:
    """The first stage's weights have a share in its input too."""

    def both() -> list[Tensor | None]:
        _, more = backward([entered], None, weights, [gx])
        return [
            a if b is None else b if a is None else a + b
            for a, b in zip(later(), more(), strict=True)
        ]

    return both
