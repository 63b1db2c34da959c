"""Compiled stages: DTensors exist while a function is traced, and not when it runs.

A stage is compiled whole (``fullgraph``), forward and backward, once per shape. So no part of it
returns to Python. An eager block launches about thirty kernels, and each reads and writes every
activation. In a compiled block, all operators between two matmuls are one kernel.

A compiled function takes and returns local tensors of each rank. Inside, ``LocalToDTensor`` makes
DTensors of the local tensors. The tracer sees through DTensors, so only kernels and collectives are
left. (If a compiled function took DTensors, every call would unwrap and rewrap the DTensors: with 2
GPUs, tp=2 and 24 layers this took 190 ms a step.) The functions that run once per step are compiled
in the same way: the all-gather of weights and the reduction of gradients.

A compiled function returns all gradients in one call. So the actions ``I`` and ``W`` of the
zero-bubble schedules are not split (see schedules/split_backward.py)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from dtron.distributed.bucketing import reduce_grads, reduce_scatter_all
from dtron.distributed.placement_codes import code
from dtron.distributed.redistribute import LocalToDTensor, ShardSpec, to_local
from dtron.distributed.symmetric_memory import copy_engine_groups, sole_copy_engine_group
from dtron.fp8.matmul import compile_options
from dtron.mesh import Layout, axes_of
from dtron.model.compute_config import PLAIN, ComputeConfig
from dtron.params import unshard_all
from dtron.rules import zero_axes
from dtron.schedules.runner import Program, StageOutput
from dtron.torch_compile import jit
from dtron.training.zero3_prefetch import Zero3Prefetch
from dtron.tree import declared, flat, unflatten


def compiled(
    functions: Program,
    layout: Layout,
    how: ComputeConfig = PLAIN,
    backend: str = "inductor",
    overlap: bool = True,
    gather_each: bool = False,
) -> Program:
    """Compile the functions of a program.

    ``how``: its FP8 recipe and its activation policy choose the compiler's options.
    ``overlap``: collectives are issued ahead of their use, and small collectives are bucketed.
    ``gather_each``: a stage all-gathers its weights itself, as under ZeRO-3."""
    mesh, options = layout.mesh, compile_options(how.recipe(end=False))
    if gather_each and overlap and (group := _weight_gather_group(mesh)):
        options |= {
            "post_grad_custom_post_pass": Zero3Prefetch(group),
            "reorder_for_peak_memory": False,
        }
    elif mesh is not None and mesh.device_type == "cuda":  # inductor knows the speed of GPUs only
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
    if backend != "inductor":
        options, plain = {}, {}
    budget = 1.0 if how.policy.budget is None else how.policy.budget
    compile = partial(jit, budget=budget, backend=backend, options=options or None)
    if mesh is None:
        return replace(functions, stage=compile(functions.stage), splits=False)
    compile_list = partial(jit, backend=backend, options=plain or None)
    stage = CompiledStage(functions, layout, compile, compile_list)
    return Program(
        stage.enter, stage.stage, False, stage, functions.carries, functions.enter_params
    )


def _weight_gather_group(mesh: DeviceMesh | None) -> str | None:
    """Return the name of the CopyEngineGroup if it alone all-gathers the weights, else None."""
    return None if mesh is None else sole_copy_engine_group(mesh, zero_axes(axes_of(mesh)))


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
off: separate copies cost least, and nothing is concatenated. Where copy engines all-gather the
weights inside a stage, ``Zero3Prefetch`` replaces all of these passes (training/zero3_prefetch.py).
"""


@dataclass(frozen=True)
class LocalWeights:
    """A stage's weights as its compiled functions take them.

    ``tree``: this rank's local tensors.
    ``specs``: the placements, shape and stride of each weight.
    ``enter``: the weights that the function ``enter`` takes."""

    tree: Any
    specs: list[ShardSpec]
    enter: LocalWeights | None = None


class CompiledStage:
    """The compiled functions of a program, on local tensors of each rank. It is also the
    ``StageWeights`` of the program (training/gradients.py)."""

    def __init__(
        self, functions: Program, layout: Layout, compile: Callable, compile_list: Callable
    ):
        self._functions, self._layout = functions, layout
        self._run, self._run_list = compile(self._traced), compile_list(self._traced_list)

    def enter(self, p: LocalWeights, batch: Any) -> Tensor:
        # The compiler traces, and at each call guards, every weight that a function takes.
        p = p.enter
        assert p is not None
        return self._run(self._enter, p.tree, p.specs, (), (), *_split_batch(batch))[0]

    def stage(
        self, p: LocalWeights, x: Tensor, batch: Any, *before: Any
    ) -> tuple[Tensor, StageOutput | None]:
        return self._run(self._functions.stage, p.tree, p.specs, (x,), before, *_split_batch(batch))

    def _enter(self, p: Any, batch: Any) -> tuple[Tensor, None]:
        return self._functions.enter(p, batch), None

    def leaves(self, params: Any, once: bool) -> tuple[LocalWeights, list[Tensor]]:
        weights = flat(params)
        tensors, specs = [to_local(w) for w in weights], [ShardSpec.of(w) for w in weights]
        if once:
            tensors, specs = self._unshard(params, tensors, specs)
        tensors = [t.detach().requires_grad_() for t in tensors]
        tree = unflatten(params, tensors)
        spec_of = dict(zip(map(id, tensors), specs, strict=True))
        enter_tree = self._functions.enter_params(tree)
        enter = LocalWeights(enter_tree, [spec_of[id(w)] for w in flat(enter_tree)])
        return LocalWeights(tree, specs, enter), tensors

    def _unshard(
        self, params: Any, tensors: list[Tensor], specs: list[ShardSpec]
    ) -> tuple[list[Tensor], list[ShardSpec]]:
        """Undo the ZeRO sharding of all weights. Return their local tensors and specs."""
        declarations, layout = declared(params), self._layout
        ready = [
            d.frozen or layout.ready(w, *d.axes)
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

    def loss(self, total: Tensor) -> Tensor:
        return self._layout.from_local(total, "+tokens")

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
        columns: tuple[list[Any], ...] = (tensors, specs, *lists)
        results = self._run_list(fn, *([xs[i] for i in rest] for xs in columns))
        changed = dict(zip(rest, results, strict=True))
        return [changed.get(i, x) for i, x in enumerate(tensors)]

    # The traced functions: local tensors in, DTensors inside, local tensors out.

    def _traced(
        self,
        fn: Callable,
        tree: Any,
        specs: list[ShardSpec],
        x: tuple[Tensor, ...],
        before: Sequence[Any],
        batch: Any,
        shards: Mapping[str, tuple[Tensor, ShardSpec]],
    ) -> tuple[Tensor, StageOutput | None]:
        from_local = self._layout.from_local
        mesh = self._layout.mesh
        assert mesh is not None
        batch = replace(
            batch, **{name: spec.to_dtensor(shard, mesh) for name, (shard, spec) in shards.items()}
        )
        like = next(getattr(batch, name) for name in shards)
        p = unflatten(
            tree, [_to_dtensor(w, spec, like) for w, spec in zip(flat(tree), specs, strict=True)]
        )
        before = [
            report and {name: from_local(part, "+tokens_sp") for name, part in report.items()}
            for report in before
        ]
        y, extra = fn(
            p, *(from_local(part, "tokens_sp", "act_embed") for part in x), batch, *before
        )
        if extra is None:
            return _local_output(y), None
        aux = None if extra.aux is None else _local_output(extra.aux)
        return _local_output(y), StageOutput(
            aux, {name: part.to_local() for name, part in extra.report.items()}
        )

    def _traced_list(
        self, fn: Callable, tensors: list[Tensor], specs: list[ShardSpec], *lists: list[Any]
    ) -> list[Tensor]:
        mesh = self._layout.mesh
        assert mesh is not None
        dtensors = [spec.to_dtensor(t, mesh) for t, spec in zip(tensors, specs, strict=True)]
        return [x.to_local() for x in fn(dtensors, *lists)]


def _to_dtensor(w: Tensor, spec: ShardSpec, like: DTensor) -> DTensor:
    return LocalToDTensor.apply(w, like, code(spec.placements), tuple(spec.shape), spec.stride)


def _local_output(y: DTensor) -> Tensor:
    """The local tensor of ``y``. On an axis where ``y`` is Partial, its gradient is Replicate: the
    gradient of the sum."""
    return y.to_local(grad_placements=[Replicate() if p.is_partial() else p for p in y.placements])


def _split_batch(batch: Any) -> tuple[Any, dict[str, tuple[Tensor, ShardSpec]]]:
    """Split a batch into the batch without its tensors, and this rank's shard of each tensor with
    its ShardSpec."""
    tensors = {f.name: x for f in fields(batch) if isinstance(x := getattr(batch, f.name), DTensor)}
    shards = {name: (to_local(x), ShardSpec.of(x)) for name, x in tensors.items()}
    return replace(batch, **dict.fromkeys(tensors)), shards
