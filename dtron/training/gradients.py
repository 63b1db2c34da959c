"""Loss and gradients of one training step, and the differences between ZeRO's three stages.

ZeRO (Rajbhandari et al. 2019, arXiv:1910.02054) shards each weight, its gradient and its optimizer
state over the ranks that would otherwise hold equal copies: the ranks of dp, and of cp. Here a ZeRO
stage is not a mode of a layer. It is the place where ``unshard`` is called, and the place where a
gradient stops being Partial:

    stage   weights at rest     gather               gradient over dp, and over cp
    0       replicated          nothing to gather    all-reduced once a step
    1       sharded over dp     once a step          stays Partial; reduce-scattered once a step
    2       sharded over dp     once a step          reduce-scattered every microbatch
    3       sharded over dp     inside each block    as 2: in the backward of the gather

Gradients accumulate in local tensors. Their dtype is at least float32, unless the config asks for
another dtype. Gradients that are still Partial (over dp_replicate, and over every axis on which a
weight is replicated) are reduced once, at the end. No ``.grad`` is set.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dtron.distributed.bucketing import GradTargets, reduce_grads, reduce_scatter_all
from dtron.distributed.redistribute import cast, full, to_local
from dtron.frozen import trained
from dtron.mesh import Layout
from dtron.params import unshard
from dtron.schedules.runner import Program, forward_table, run, run_forward
from dtron.training.pipeline import Pipeline
from dtron.tree import flat, unflatten


class StageWeights(Protocol):
    """The weights that a program's functions take, and the gradients that they return: DTensors
    (``EagerWeights``), or local tensors of each rank (``compiled_stage.CompiledStage``).
    ``grads`` and ``params`` are lists in the order of a stage's trained weights."""

    def leaves(self, params: Any, once: bool, frozen: Sequence[bool]) -> tuple[Any, list[Tensor]]:
        """Return a stage's weights for its functions, and the tensors to differentiate by.

        ``once``: all-gather the weights now, and not inside the functions.
        ``frozen``: for each weight, whether it has no gradient."""

    def finish(self, weights: Any) -> None:
        """Wait for gradients that are still on their way, after the backward of a microbatch."""

    def accumulate(self, sums: list[Tensor], grads: list[Tensor]) -> None:
        """Add gradients, in any dtype, to the local tensors of sums in place."""

    def reduce_scatter(
        self, weights: Any, grads: list[Tensor], params: list[Tensor]
    ) -> list[Tensor]:
        """Reduce-scatter gradients over the axes on which their params are sharded."""

    def reduce(
        self, weights: Any, grads: list[Tensor], params: list[Tensor], scattered: bool
    ) -> list[Tensor]:
        """Reduce gradients to the placements of their params.

        ``scattered``: whether ``reduce_scatter`` has reduce-scattered the gradients before."""


def add_all(sums: list[Tensor], grads: list[Tensor]) -> None:
    """Add in place, by few kernels if both have one dtype."""
    if sums:
        torch._foreach_add_(sums, grads)


@dataclass(frozen=True)
class EagerWeights:
    """The weights of functions on DTensors, or on the tensors of one device."""

    layout: Layout

    def leaves(self, params: Any, once: bool, frozen: Sequence[bool]) -> tuple[Any, list[Tensor]]:
        ready = flat(unshard(params, self.layout, once) if once else params)
        tensors = [leaf(w, not is_frozen) for w, is_frozen in zip(ready, frozen, strict=True)]
        return unflatten(params, tensors), [w for w in tensors if w.requires_grad]

    def finish(self, weights: Any) -> None:
        """An eager backward has waited for its gradients."""

    def accumulate(self, sums: list[Tensor], grads: list[Tensor]) -> None:
        add_all(sums, grads)

    def reduce_scatter(
        self, weights: Any, grads: list[Tensor], params: list[Tensor]
    ) -> list[Tensor]:
        if self.layout.mesh is None:
            return grads
        return [*reduce_scatter_all(typing.cast("list[DTensor]", grads), self._goals(params))]

    def reduce(
        self, weights: Any, grads: list[Tensor], params: list[Tensor], scattered: bool
    ) -> list[Tensor]:
        if self.layout.mesh is None:
            return grads
        return [*reduce_grads(typing.cast("list[DTensor]", grads), self._goals(params))]

    def _goals(self, params: list[Tensor]) -> GradTargets:
        return [(p.placements, self.layout.summed(p)) for p in typing.cast("list[DTensor]", params)]


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
    """Compute ``(loss, gradients, reports)`` of a step.

    ``params``: the trees of this process's stages, in the order of ``pipe.stages``.
    ``tokens``: the divisor of the loss. The gradients are not divided, see below.
    ``gather_each``: whether ZeRO-3 all-gathers weights in every microbatch. If not, it all-gathers
        once a step, as ZeRO-1 and 2 do (a pipeline may have many microbatches).
    ``look(stage, microbatch, gradients)``: called with the gradients of every microbatch before
        they are added up. Its kernels may be loaded in the middle of the step. So messages between
        stages go through the hosts.

    The loss is the sum over microbatches divided by ``tokens``: a scalar, still Partial over the
    data ranks, or None if the last stage is on another rank.

    The gradients belong to the *sum* of the loss and the auxiliary losses that stages add. The
    caller divides the gradients: the optimizer multiplies by a scale anyway, in the same pass. (In
    bfloat16 backward, 1 / tokens would be off by up to 0.4 %.) The gradients are a tree like params
    with the params' placements. They keep the dtype in which they were added up
    (``Layout.summed``), or have the compute dtype if there was nothing to add.

    The reports of this process's stages, by stage and name, are plain tensors, summed over
    microbatches and ranks, or maxima over them."""
    layout, stage_weights = pipe.layout, functions.stage_weights or EagerWeights(pipe.layout)
    by_stage = {s: (p, pipe.specs[s]) for s, p in zip(pipe.stages, params, strict=True)}
    once = zero < 3 or not gather_each
    leaves = {
        s: stage_weights.leaves(p, once, [w.frozen for w in flat(spec)])
        for s, (p, spec) in by_stage.items()
    }
    weights, tensors = ({s: pair[i] for s, pair in leaves.items()} for i in (0, 1))
    changed = {s: trained(spec, p) for s, (p, spec) in by_stage.items()}
    targets = {s: flat(p) for s, p in changed.items()}
    sums: dict[int, list[Tensor]] = {}
    several = len(microbatches) > 1

    def accumulate(stage: int, microbatch: int, grads: list[Any]) -> None:
        stage_weights.finish(weights[stage])
        if look is not None:
            look(stage, microbatch, grads)
        ps, first = targets[stage], stage not in sums
        # Later microbatches are added in place to the gradients of the first microbatch. So no two
        # weights may share a gradient tensor. Two weights whose sum is used do share one.
        shared = len({id(g) for g in grads}) < len(grads)
        grads = [_zeros(w) if g is None else g for g, w in zip(grads, tensors[stage], strict=True)]
        if zero >= 2:
            grads = stage_weights.reduce_scatter(weights[stage], grads, ps)
        if first:
            if several or shared:
                pairs = zip(grads, ps, strict=True)
                grads = [cast(g, layout.summed(p), copy=True) for g, p in pairs]
            sums[stage] = grads
        else:
            pairs = (list(map(to_local, xs)) for xs in (sums[stage], grads))
            stage_weights.accumulate(*pairs)

    links = pipe.links(microbatches[0], by_host=look is not None)
    out = run(pipe.table, pipe.ranks, functions, weights, tensors, microbatches, links, accumulate)
    grads = [
        g
        for s in pipe.stages
        for g in stage_weights.reduce(weights[s], sums.pop(s), targets[s], zero >= 2)
    ]
    tree = pipe.reduce_tied_embedding(unflatten(tuple(changed.values()), grads))
    loss = None if out.total is None else out.total / tokens
    reports = {s: _summed(r, layout) for s, r in out.reports.items()}
    for s, maxima in out.maxima.items():
        reports[s] = {**reports.get(s, {}), **{name: full(x) for name, x in maxima.items()}}
    return loss, tree, reports


def evaluate(
    functions: Program, weights: Any, microbatches: Sequence[Any], pipe: Pipeline
) -> Tensor | None:
    """Return the last stage's outputs, summed over any number of microbatches, without gradients.
    None if the last stage is on another rank."""
    first, *others = forwards(functions, weights, microbatches, pipe) or [None]
    return sum(others, first)


def forwards(
    functions: Program, weights: Any, microbatches: Sequence[Any], pipe: Pipeline
) -> list[Any]:
    """Return the last stage's output for each of any number of microbatches, without gradients. An
    empty list if the last stage is on another rank."""
    t = forward_table(pipe.table, len(microbatches))
    by_stage = dict(zip(pipe.stages, weights, strict=True))
    return run_forward(
        t, pipe.ranks, functions, by_stage, microbatches, pipe.links(microbatches[0], t)
    )


def _summed(report: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Sum a report over the ranks that have tokens. All its tensors are concatenated, so there is
    one all-reduce per mesh axis."""
    parts = [to_local(x) for x in report.values()]
    total = full(layout.from_local(torch.cat([x.flatten() for x in parts]), "+tokens_sp"))
    split = total.split([x.numel() for x in parts])
    return {name: x.view(part.shape) for name, part, x in zip(report, parts, split, strict=True)}


def leaf(w: Tensor, trained: bool) -> Tensor:
    """Return a weight as the leaf of a new autograd graph."""
    return w.detach().requires_grad_(trained)


def _zeros(w: Tensor) -> Tensor:
    """The gradient of a weight that the loss does not depend on."""
    return torch.zeros_like(w)
