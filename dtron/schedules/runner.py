"""The runner: executes any valid table. It contains no code for a particular schedule.

A stage is a function ``stage(params, x, batch) -> (y, output)``. The last stage's y is the loss.
Any stage may add a term to the loss with ``output.aux`` and return statistics in
``output.report``. F runs the stage and keeps the edges of the autograd graph at y and aux. B
calls ``torch.autograd.grad`` on these edges. I and W are the two halves of B
(split_backward.py). Nothing reads or writes ``.grad``. The saved activations of a microbatch in
a stage are freed at its B or W. So the number of live activations never exceeds the table's
``peaks``.

The table also determines the messages between ranks. After F, the activation is sent to the rank
of the next stage; after B or I, the gradient is sent to the rank of the previous stage. The
links do the sending (p2p.py)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dtron.distributed.redistribute import pending_maximum, shard_like
from dtron.schedules.p2p import Links
from dtron.schedules.split_backward import (
    CompiledHalves,
    DeferredWeightGrad,
    backward,
    backward_input,
)
from dtron.schedules.table import Action, Table


class StageOutput(NamedTuple):
    """A stage's outputs besides y.

    ``aux``: a scalar that is added to the loss, a sum over tokens like the loss (None: nothing).
    ``report``: statistics, by name, without gradients: sums over tokens, which are summed over
        microbatches.
    ``maxima``: statistics that are maxima over tokens, and become maxima over microbatches."""

    aux: Tensor | None
    report: dict[str, Tensor]
    maxima: dict[str, Tensor] = {}


def all_params(params: Any) -> Any:
    """Return the params themselves."""
    return params


@dataclass(frozen=True)
class Program:
    """A model as functions of one stage's params.

    ``enter(params, batch) -> x``: makes the first stage's input (token embeddings).
    ``enter_params(params)``: the part of the params that ``enter`` uses, as a tree of the same
        class.
    ``stage(params, x, batch) -> (y, output)``: a stage. The last stage's y is a scalar loss;
        ``output`` is a ``StageOutput`` or None.
    ``splits``: False if the backward cannot be split into two halves, because the stage
        recomputes.
    ``halves``: where compiled units leave the second halves of their backward (None: no unit is
        compiled in halves).
    ``stage_weights``: turns params into the functions' params argument (None: params are passed as
        they are); see ``StageWeights`` in training/gradients.py.
    ``carries``: a stage takes, as its last argument, the sum of its reports on the previous
        microbatches, or None."""

    enter: Callable[[Any, Any], Tensor]
    stage: Callable[..., tuple[Tensor, StageOutput | None]]
    splits: bool = True
    stage_weights: Any = None
    carries: bool = False
    enter_params: Callable[[Any], Any] = all_params
    halves: CompiledHalves | None = None


@dataclass
class SavedForward:
    """The state that one microbatch keeps in one stage, from its F to its B or W.

    ``ends``: the edges of y and aux.
    ``entered``: the first stage's input, with its own graph.
    ``later``: computes the weight gradients, after B or I."""

    x: Tensor
    ends: list[GradientEdge]
    entered: Tensor | None
    later: DeferredWeightGrad | None = None


@dataclass
class PipelineResult:
    """The result of a run.

    ``total``: the last stage's outputs, summed over microbatches; None if that stage is in
        another process.
    ``reports``: the reports of this process's stages, by stage, summed over microbatches.
    ``maxima``: the maxima of these stages, by stage, over microbatches.
    ``peak``: the largest number of activations that each rank of this process kept at once."""

    total: Tensor | None
    reports: dict[int, dict[str, Tensor]]
    maxima: dict[int, dict[str, Tensor]]
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
    """Execute the rows of ``ranks``.

    ``weights[stage]``: a stage's params, as its function takes them.
    ``flat[stage]``: the tensors in these params to differentiate by.
    ``take``: called as ``take(stage, microbatch, gradients)`` with the gradients of each
        microbatch's loss."""
    kept: dict[tuple[int, int], SavedForward] = {}
    alive, peak = dict.fromkeys(ranks, 0), dict.fromkeys(ranks, 0)
    total = None
    reports: dict[int, dict[str, Tensor]] = {}
    maxima: dict[int, dict[str, Tensor]] = {}
    units: dict[int, list[Tensor]] = {}
    for rank, a in t.order:
        if rank not in alive:
            continue
        stage, m, last = a.stage, a.microbatch, a.stage == t.stages - 1
        if a.kind == "F":
            entered = program.enter(weights[stage], batches[m]) if stage == 0 else None
            x = links.receive(Action("F", stage - 1, m)) if entered is None else entered.detach()
            x = x.requires_grad_()
            before = (reports.get(stage),) if program.carries else ()
            args = (weights[stage], x, batches[m], *before)
            kept[stage, m], values, output = _forward(program.stage, entered, *args)
            y = values[0]
            if stage not in units:  # gradients of the loss terms: ones
                units[stage] = [_one(value) for value in (values if last else values[1:])]
            if output is not None and output.report:
                reports[stage] = _merge(operator.add, reports.get(stage), output.report)
            if output is not None and output.maxima:
                maxima[stage] = _merge(pending_maximum, maxima.get(stage), output.maxima)
            alive[rank] += 1
            peak[rank] = max(peak[rank], alive[rank])
            if last:
                total = y if total is None else total + y
            else:
                links.send(a, y)
            continue
        here = kept[stage, m]
        if a.kind != "W":
            gs = units[stage]
            if not last:
                gs = [links.receive(*t.gradient_from(stage, m)), *gs]
            split = partial(backward_input, compiled=program.halves)
            run_backward = split if a.kind == "I" and program.splits else backward
            gx, here.later = run_backward(here.ends, here.x, flat[stage], gs)
            here.ends = []
            assert gx is not None
            if here.entered is None:
                links.send(a, gx)
            elif here.entered.requires_grad:  # not where the embedding is frozen
                edge = get_gradient_edge(here.entered)
                here.later = _and_enter(here.later, edge, gx, flat[stage])
        if a.kind != "I":
            assert here.later is not None  # B or I has set it
            take(stage, m, here.later())
            here.later = None
            del kept[stage, m]
            alive[rank] -= 1
    links.finish()
    return PipelineResult(total, reports, maxima, peak)


def _forward(
    stage: Callable, entered: Tensor | None, weights: Any, x: Tensor, *rest: Any
) -> tuple[SavedForward, list[Tensor], StageOutput | None]:
    """Run a stage. Return the state kept for backward; the values of y and, if there is one, of
    aux; and the stage's output without aux. Of the three results only the first keeps activations
    alive."""
    y, output = stage(weights, x, *rest)
    ends = [y] if output is None or output.aux is None else [y, output.aux]
    kept = SavedForward(x, [get_gradient_edge(end) for end in ends], entered)
    return kept, [end.detach() for end in ends], output and output._replace(aux=None)


def _one(x: Tensor) -> Tensor:
    return shard_like(torch.ones((), dtype=x.dtype, device=x.device), x)


def _merge(
    fn: Callable[[Tensor, Tensor], Tensor],
    old: dict[str, Tensor] | None,
    more: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Merge the statistics of a microbatch with those of earlier ones by ``fn``."""
    return more if old is None else {name: fn(old[name], x) for name, x in more.items()}


@torch.no_grad()
def run_forward(
    t: Table,
    ranks: Sequence[int],
    program: Program,
    weights: Mapping[int, Any],
    batches: Sequence[Any],
    links: Links,
) -> list[Any]:
    """Execute a table of forwards. Return the last stage's output for each microbatch; an empty
    list if that stage is in another process."""
    results = []
    for rank, a in t.order:
        if rank not in ranks:
            continue
        stage, m = a.stage, a.microbatch
        if stage == 0:
            x = program.enter(weights[0], batches[m])
        else:
            x = links.receive(Action("F", stage - 1, m))
        y, _ = program.stage(weights[stage], x, batches[m])
        if stage == t.stages - 1:
            results.append(y)
        else:
            links.send(a, y)
    links.finish()
    return results


def forward_table(t: Table, microbatches: int) -> Table:
    """Make a table of forwards only, for any number of microbatches, on the ranks of ``t``."""
    order = [Action("F", s, m) for m in range(microbatches) for s in range(t.stages)]
    rows = (tuple(a for a in order if t.rank_of[a.stage] == rank) for rank in range(len(t.rows)))
    return Table(f"forwards of {t.name}", t.stages, microbatches, tuple(rows))


def _and_enter(
    later: DeferredWeightGrad, entered: GradientEdge, gx: Tensor, weights: Sequence[Tensor]
) -> DeferredWeightGrad:
    """Add the weight gradients from ``enter``: the first stage's input depends on weights too."""

    def both() -> list[Tensor | None]:
        _, more = backward([entered], None, weights, [gx])
        return [_add(a, b) for a, b in zip(later(), more(), strict=True)]

    return both


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b
