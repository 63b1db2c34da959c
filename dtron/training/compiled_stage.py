"""Compiled stages: DTensors exist while a function is traced, and not when it runs.

Each kind of unit of a stage (its blocks, the loss) is compiled whole (``fullgraph``), forward and
backward, once per shape: see compiled_units.py. No part of a unit returns to Python. An eager block
launches about thirty kernels, and each reads and writes every activation. In a compiled block, all
operators between two matmuls are one kernel.

The functions that run once per step are compiled in the same way: the all-gather of weights and the
reduction of gradients.

For the zero-bubble schedules the backward of a unit is two graphs (backward_halves.py)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dtron.distributed.bucketing import reduce_grads, reduce_scatter_all
from dtron.distributed.redistribute import ShardSpec, to_local
from dtron.distributed.symmetric_memory import copy_engine_groups
from dtron.fp8.matmul import compile_options
from dtron.mesh import Layout
from dtron.model.compute_config import PLAIN, ComputeConfig
from dtron.params import unshard_all
from dtron.schedules.runner import Program, StageOutput
from dtron.torch_compile import own_generator
from dtron.training.backward_halves import BackwardHalves
from dtron.training.compiled_units import CompiledUnits
from dtron.training.gathered_weight import LocalWeight
from dtron.training.gradients import add_all, leaf
from dtron.training.traced_function import GraphCompiler, TracedFunction
from dtron.training.zero3_prefetch import Prefetch, pack, sum_rows
from dtron.tree import declared, flat, unflatten


def compiled(
    functions: Program,
    layout: Layout,
    how: ComputeConfig = PLAIN,
    backend: Any = "inductor",
    overlap: bool = True,
) -> Program:
    """Compile the functions of a program.

    ``how``: its FP8 recipe and its activation policy choose the compiler's options.
    ``overlap``: collectives are issued ahead of their use, and small collectives are bucketed."""
    mesh, options = layout.mesh, compile_options(how.recipe(end=False))
    if mesh is not None and mesh.device_type == "cuda":  # inductor knows the speed of GPUs only
        # Code from the cache of an earlier run calls operators that only this import registers.
        importlib.import_module("torch._inductor.fx_passes.bucketing")
        off = {
            "insert_overlap_deps": how.policy.recomputes_attention,
            "collective_bucketing": bool(copy_engine_groups(mesh)),
        }
        passes = {name: overlap and not off.get(name) for name in OVERLAP}
        options |= {f"aten_distributed_optimizations.{name}": on for name, on in passes.items()}
    plain = {} if mesh is None else _simple_overlap_off()
    options |= plain
    by_inductor = backend == "inductor" or own_generator(backend) is not None
    if not by_inductor:
        options, plain = {}, {}
    budget = 1.0 if how.policy.budget is None else how.policy.budget
    # Without a mesh all stages are in this process, and nothing waits for a gradient.
    splits = functions.splits and mesh is not None and by_inductor
    halves = BackwardHalves() if splits else None
    compiler = GraphCompiler(backend, options or None, budget, halves)
    units = CompiledUnits(mesh, compiler)
    if mesh is None:
        return replace(functions, stage=partial(functions.stage, call=units), splits=False)
    stage = CompiledStage(functions, layout, units, GraphCompiler(backend, plain or None))
    return replace(
        functions,
        enter=stage.enter,
        stage=stage.stage,
        splits=splits,
        stage_weights=stage,
        halves=halves,
    )


def _simple_overlap_off() -> dict[str, bool]:
    """The option that turns off a pass of torch 2.14, for a torch that has the pass. The pass is on
    by default: it issues collectives early and waits for them late. The collectives of a stage are
    in an order already (``OVERLAP``), and the pass has not been measured on top of it."""
    name = "aten_distributed_optimizations.enable_simple_overlap"
    return {name: False} if name in torch._inductor.list_options() else {}


OVERLAP = ("enable_overlap_scheduling", "collective_bucketing", "insert_overlap_deps")
"""Inductor's passes for overlap. An option that is not set is not off, so each is set explicitly.

Two passes fail in torch 2.11 with an AssertionError:

* ``collective_bucketing``: buckets of many all-reduces wait for each other. So the functions on
  lists of weights or gradients are compiled without any of these passes. Such functions have no
  compute to hide a collective behind.
* ``insert_overlap_deps`` wraps the operators that must stay behind a collective. Recomputed
  attention is a kernel that could draw random numbers, and cannot be wrapped. So this pass is off
  where attention is recomputed.

Where copy engines all-gather the weights (distributed/copy_engine.py), ``collective_bucketing`` is
off: separate copies cost least, and nothing is concatenated.
"""


@dataclass(frozen=True)
class LocalWeights:
    """A stage's weights as its compiled functions take them.

    ``tree``: a ``LocalWeight`` for each weight.
    ``specs``: the placements, shape and stride of each trained weight.
    ``prefetch``: all-gathers the weights of units under ZeRO-3, and sends their gradients."""

    tree: Any
    specs: list[ShardSpec]
    prefetch: Prefetch


class CompiledStage:
    """The compiled functions of a program, on local tensors of each rank. It is also the
    ``StageWeights`` of the program (training/gradients.py)."""

    def __init__(
        self, functions: Program, layout: Layout, units: CompiledUnits, compiler: GraphCompiler
    ):
        self._functions, self._layout, self._units = functions, layout, units
        self._run_list = TracedFunction(self._on_list, compiler, layout)
        self._sum_rows = TracedFunction(sum_rows, compiler)
        self._pack = TracedFunction(pack, compiler)
        self._add = TracedFunction(_add, compiler)

    def enter(self, p: LocalWeights, batch: Any) -> Tensor:
        units = self._units.gathering(p.prefetch)
        (weights,) = units.gathered([(self._functions.enter_params(p.tree), None)])
        return units(_enter, self._functions.enter, weights, batch)[0]

    def stage(
        self, p: LocalWeights, x: Tensor, batch: Any, *before: Any
    ) -> tuple[Tensor, StageOutput | None]:
        units = self._units.gathering(p.prefetch)
        return self._functions.stage(p.tree, x, batch, *before, call=units)

    def leaves(
        self, params: Any, once: bool, frozen: Sequence[bool]
    ) -> tuple[LocalWeights, list[Tensor]]:
        weights = flat(params)
        tensors, specs = [to_local(w) for w in weights], [ShardSpec.of(w) for w in weights]
        if once:
            tensors, specs = self._unshard(params, tensors, specs)
        tensors = [leaf(t, not is_frozen) for t, is_frozen in zip(tensors, frozen, strict=True)]
        local = [LocalWeight(w, spec) for w, spec in zip(tensors, specs, strict=True)]
        prefetch = Prefetch(self._layout, self._sum_rows, self._pack)
        trained = [w for w in local if w.local.requires_grad]
        specs = [w.spec for w in trained]
        return LocalWeights(unflatten(params, local), specs, prefetch), [w.local for w in trained]

    def finish(self, weights: LocalWeights) -> None:
        weights.prefetch.finish()

    def accumulate(self, sums: list[Tensor], grads: list[Tensor]) -> None:
        """Where a sum has another dtype, torch's own addition is slow."""
        pairs = [*zip(sums, grads, strict=True)]
        same = [(s, g) for s, g in pairs if s.dtype == g.dtype]
        add_all([s for s, _ in same], [g for _, g in same])
        for s, g in pairs:
            if s.dtype != g.dtype:
                dense = s.is_contiguous() and g.is_contiguous()
                self._add([s.view(-1), g.view(-1)] if dense else [s, g])

    def _unshard(
        self, params: Any, tensors: list[Tensor], specs: list[ShardSpec]
    ) -> tuple[list[Tensor], list[ShardSpec]]:
        """Undo the ZeRO sharding of all weights. Return their local tensors and specs."""
        declarations, layout = declared(params), self._layout
        ready = [
            d.buffer or layout.ready(w, *d.axes)
            for w, d in zip(flat(params), declarations, strict=True)
        ]
        unsharded = [
            spec if is_ready else replace(spec, placements=layout.unsharded(*d.axes))
            for spec, is_ready, d in zip(specs, ready, declarations, strict=True)
        ]
        rest = [d for d, is_ready in zip(declarations, ready, strict=True) if not is_ready]

        def unshard_rest(weights: list[DTensor]) -> list[Tensor]:
            return unshard_all(weights, rest, layout, once=True)

        return self._run_on_rest(unshard_rest, tensors, specs, ready), unsharded

    def reduce_scatter(
        self, weights: LocalWeights, grads: list[Tensor], params: list[DTensor]
    ) -> list[Tensor]:
        specs = [spec.gradient for spec in weights.specs]
        return self._redistribute(reduce_scatter_all, grads, specs, params)

    def reduce(
        self, weights: LocalWeights, grads: list[Tensor], params: list[DTensor], scattered: bool
    ) -> list[DTensor]:
        specs = [spec.gradient for spec in weights.specs]
        if scattered:
            specs = [
                spec.reduce_scattered(p.placements) for spec, p in zip(specs, params, strict=True)
            ]
        grads = self._redistribute(reduce_grads, grads, specs, params)
        return [
            ShardSpec.of(p).to_dtensor(g, p.device_mesh) for g, p in zip(grads, params, strict=True)
        ]

    def _redistribute(
        self, fn: Callable, grads: list[Tensor], specs: list[ShardSpec], params: list[DTensor]
    ) -> list[Tensor]:
        """Run ``fn`` on the gradients that do not have the placements of their params yet."""
        goals = [(tuple(p.placements), self._layout.summed(p)) for p in params]
        ready = [spec.placements == goal for spec, (goal, _) in zip(specs, goals, strict=True)]
        return self._run_on_rest(fn, grads, specs, ready, goals)

    def _run_on_rest(
        self,
        fn: Callable,
        tensors: list[Tensor],
        specs: list[ShardSpec],
        ready: list[bool],
        *lists: list[Any],
    ) -> list[Tensor]:
        """Run the compiled ``fn`` on the tensors that are not ready. Return all tensors.

        ``lists``: further arguments of ``fn``, with an item for each tensor."""
        rest = [i for i, is_ready in enumerate(ready) if not is_ready]
        if not rest:
            return tensors
        columns = [[xs[i] for i in rest] for xs in (specs, *lists)]
        results = self._run_list([tensors[i] for i in rest], fn, *columns)
        changed = dict(zip(rest, results, strict=True))
        return [changed.get(i, x) for i, x in enumerate(tensors)]

    def _on_list(
        self, tensors: list[Tensor], fn: Callable, specs: list[ShardSpec], *lists: list[Any]
    ) -> tuple[list[Tensor], None]:
        mesh = self._layout.mesh
        assert mesh is not None
        dtensors = [spec.to_dtensor(t, mesh) for t, spec in zip(tensors, specs, strict=True)]
        return [x.to_local() for x in fn(dtensors, *lists)], None


def _enter(enter: Callable, p: Any, batch: Any) -> tuple[Tensor]:
    return (enter(p, batch),)


def _add(tensors: list[Tensor]) -> tuple[list[Tensor], None]:
    total, x = tensors
    total.add_(x)
    return [], None
