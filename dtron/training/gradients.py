"""One training step: loss and gradients over microbatches, and where ZeRO's three stages differ.

ZeRO (Rajbhandari et al. 2019, arXiv:1910.02054) stores each weight, its gradient and its optimizer
state on one of the ranks that would have the same (those of dp, and of cp) instead of on all. Here
a stage is not a mode of any layer; it is *where* ``gather`` is called and where a gradient stops
being a pending sum:

    stage   weights at rest     gather               gradient over dp, and over cp
    0       whole               nothing to gather    all-reduced once a step
    1       sharded over dp     once a step          stays Partial; reduce-scattered once a step
    2       sharded over dp     once a step          reduce-scattered every microbatch
    3       sharded over dp     inside each block    as 2: that is the backward of the gather

Gradients accumulate in local tensors, float32 at least unless asked otherwise, and everything still
Partial (over dp_replicate, and all axes on which a weight is whole) is reduced once, at the end. No
``.grad`` is set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dtron.distributed.bucketing import GradTargets, reduce_grads, reduce_scatter_all
from dtron.distributed.redistribute import cast, full, local
from dtron.mesh import Layout
from dtron.params import flat, gather, tree_map, unflatten
from dtron.schedules.runner import Program, forward_table, run, run_forward
from dtron.training.pipeline import Pipeline


class StageWeights(Protocol):
    """What a program's functions take and give: DTensors (``EagerWeights``), or each rank's own
    tensors (``compiled_stage.CompiledStage``). Gradients are lists in the order of a stage's weights, and
    ``params`` too."""

    def leaves(self, params: Any, once: bool) -> tuple[Any, list[Tensor]]:
        """A stage's weights for its functions, and the tensors to differentiate by. ``once``:
        gather them now, and not inside the functions."""

    def scatter(self, weights: Any, grads: list[Tensor], params: list[Tensor]) -> list[Tensor]:
        """Gradients shrunk to where the params are sharded."""

    def reduce(
        self, weights: Any, grads: list[Tensor], params: list[Tensor], scattered: bool
    ) -> list[Tensor]:
        """Gradients, shrunk before or not, as tensors that lie like the params."""

    def loss(self, total: Tensor) -> Tensor:
        """The summed loss, its sum over data ranks pending."""


@dataclass(frozen=True)
class EagerWeights:
    """Functions of DTensors, or of one device's tensors."""

    layout: Layout

    def leaves(self, params: Any, once: bool) -> tuple[Any, list[Tensor]]:
        weights = tree_map(_leaf, gather(params, self.layout, once) if once else params)
        return weights, flat(weights)

    def scatter(self, weights: Any, grads: list[Tensor], params: list[Tensor]) -> list[Tensor]:
        return grads if self.layout.mesh is None else reduce_scatter_all(grads, self._goals(params))

    def reduce(
        self, weights: Any, grads: list[Tensor], params: list[Tensor], scattered: bool
    ) -> list[Tensor]:
        return grads if self.layout.mesh is None else reduce_grads(grads, self._goals(params))

    def _goals(self, params: list[Tensor]) -> GradTargets:
        return [(p.placements, self.layout.summed(p)) for p in params]

    def loss(self, total: Tensor) -> Tensor:
        return total


Reports = dict[int, dict[str, Tensor]]


def gradients(
    functions: Program,
    params: Any,
    microbatches: Sequence[Any],
    tokens: int,
    pipe: Pipeline,
    zero: int,
    gather_each: bool = True,
    look: Callable[[int, int, list[Tensor | None]], None] | None = None,
) -> tuple[Tensor | None, Any, Reports]:
    """``(loss, gradients, reports)`` of a step: the microbatches' summed losses divided by
    ``tokens``, and the gradients of the *sum*, of the loss and of what stages add to it. Whoever
    uses these divides, in the same pass: the optimizer multiplies by a scale anyway. (In bfloat16
    backward, 1 / tokens would be off by up to 0.4 %.)

    ``params`` are the trees of the stages here, in the order of ``pipe.stages``. The loss is a scalar with
    its sum over data ranks pending (None where the last stage is elsewhere); the gradients are a tree like
    params, with the params' placements, in the dtype that they were added up in (``Layout.summed``), or that
    of computation where there was nothing to add. Reports are those of the stages here, by stage and name,
    summed over microbatches and ranks: plain tensors.
    ``look(stage, microbatch, gradients)`` sees those of every microbatch before they are added up. What it
    does for that may be loaded in the middle of the step, so the stages' messages go by way of the hosts.
    ``gather_each``: whether ZeRO-3 gathers in every microbatch, or like 1 and 2 once a step (a pipeline may
    have many microbatches)."""
    layout, hold = pipe.layout, functions.hold or EagerWeights(pipe.layout)
    leaves = {
        s: hold.leaves(p, once=zero < 3 or not gather_each)
        for s, p in zip(pipe.stages, params, strict=True)
    }
    weights, tensors = ({s: pair[i] for s, pair in leaves.items()} for i in (0, 1))
    targets = {s: flat(p) for s, p in zip(pipe.stages, params, strict=True)}
    sums: dict[int, list[Tensor]] = {}
    several = len(microbatches) > 1

    def take(stage: int, microbatch: int, grads: list[Tensor | None]) -> None:
        if look is not None:
            look(stage, microbatch, grads)
        ps, first = targets[stage], stage not in sums
        # The first microbatch's are added to in place, so they must be nobody else's: two weights
        # that are added up have one and the same gradient.
        shared = len({id(g) for g in grads}) < len(grads)
        grads = [_zeros(w) if g is None else g for g, w in zip(grads, tensors[stage], strict=True)]
        if zero >= 2:
            grads = hold.scatter(weights[stage], grads, ps)
        if several or shared:
            grads = [cast(g, layout.summed(p), copy=first) for g, p in zip(grads, ps, strict=True)]
        if first:
            sums[stage] = grads
        else:
            torch._foreach_add_([local(s) for s in sums[stage]], [local(g) for g in grads])

    links = pipe.links(microbatches[0], local=functions.hold is not None, by_host=look is not None)
    out = run(pipe.table, pipe.ranks, functions, weights, tensors, microbatches, links, take)
    found = [
        g for s in pipe.stages for g in hold.reduce(weights[s], sums.pop(s), targets[s], zero >= 2)
    ]
    found = pipe.add_twins(unflatten(params, found))
    loss = None if out.total is None else hold.loss(out.total) / tokens
    return loss, found, {s: _summed(r, layout) for s, r in out.reports.items()}


def evaluate(
    functions: Program, weights: Any, microbatches: Sequence[Any], pipe: Pipeline
) -> Tensor | None:
    """The last stage's outputs, summed over microbatches, without gradients; None where that stage
    is elsewhere. Any number of microbatches."""
    t = forward_table(pipe.table, len(microbatches))
    by_stage = dict(zip(pipe.stages, weights, strict=True))
    return run_forward(
        t, pipe.ranks, functions, by_stage, microbatches, pipe.links(microbatches[0], t)
    )


def _summed(report: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Over the ranks that have tokens; laid end to end, one all-reduce per mesh axis."""
    parts = [local(x) for x in report.values()]
    line = full(layout.from_local(torch.cat([x.flatten() for x in parts]), "+tokens_sp"))
    split = line.split([x.numel() for x in parts])
    return {name: x.view(part.shape) for name, part, x in zip(report, parts, split, strict=True)}


def _leaf(w: Tensor) -> Tensor:
    return w.detach().requires_grad_()


def _zeros(w: Tensor) -> Tensor:
    """The gradient of a weight that the loss does not depend on."""
    return torch.zeros_like(w)
