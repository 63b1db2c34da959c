"""Compiled stages: DTensors exist while a function is traced, and not when it runs.

A stage is compiled whole (``fullgraph``), forward and backward, once per shape. So no part of it
returns to Python. An eager block launches about thirty kernels, and each reads and writes every
activation. In a compiled block, all operators between two matmuls are one kernel.

A compiled function takes and returns local tensors of each rank. Inside, ``LocalToDTensor`` turns
them into DTensors again. The tracer sees through DTensors, so only kernels and collectives are
left. (If a compiled function took DTensors, every call would unwrap and rewrap them: with 2 GPUs,
tp=2 and 24 layers that took 190 ms a step.) The functions that run once per step are compiled in
the same way: the gathering of weights and the reduction of gradients.

A compiled function returns all gradients in one call. So the actions ``I`` and ``W`` of the
zero-bubble schedules are not split (see schedules/split_backward.py)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from dtron.distributed.bucketing import reduce_grads, reduce_scatter_all
from dtron.distributed.redistribute import LocalToDTensor, ShardSpec, code, to_local
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
    fetches: bool = False,
) -> Program:
    """Compile the functions of a program.

    ``how``: its FP8 recipe and its activation policy choose the compiler's options.
    ``overlap``: collectives are issued ahead of their use, and small collectives are bucketed.
    ``fetches``: a stage all-gathers its weights itself, as under ZeRO-3."""
    mesh, options = layout.mesh, compile_options(how.recipe(end=False))
    if fetches and overlap and (group := _carried(mesh)):
        options |= {
            "post_grad_custom_post_pass": Zero3Prefetch(group),
            "reorder_for_peak_memory": False,
        }
    elif mesh is not None and mesh.device_type == "cuda":  # inductor knows the speed of GPUs only
        # Code that comes from the cache of an earlier run calls operators that only this import
        # registers.
        importlib.import_module("torch._inductor.fx_passes.bucketing")
        left_out = {
            "insert_overlap_deps": how.policy.recomputes_attention,
            "collective_bucketing": bool(copy_engine_groups(mesh)),
        }
        passes = {name: overlap and not left_out.get(name) for name in OVERLAP}
        options |= {f"aten_distributed_optimizations.{name}": on for name, on in passes.items()}
    options = options if backend == "inductor" else None
    budget = 1.0 if how.policy.budget is None else how.policy.budget
    compile = partial(jit, budget=budget, backend=backend, options=options or None)
    if mesh is None:
        return replace(functions, stage=compile(functions.stage), splits=False)
    here = CompiledStage(functions, layout, compile, partial(jit, backend=backend))
    return Program(here.enter, here.stage, False, here, functions.carries, functions.enter_params)


def _carried(mesh: DeviceMesh | None) -> str | None:
    return None if mesh is None else sole_copy_engine_group(mesh, zero_axes(axes_of(mesh)))


OVERLAP = ("enable_overlap_scheduling", "collective_bucketing", "insert_overlap_deps")
"""Inductor's passes for overlap. An option that is not set is not off, so each is set explicitly.

Two passes fail in torch 2.11 with an AssertionError:

* ``collective_bucketing``: buckets of many all-reduces wait for each other. So the functions on
  lists of weights or gradients are compiled without any of these passes. They have no compute to
  hide a collective behind.
* ``insert_overlap_deps`` wraps the operators that must stay behind a collective. Recomputed
  attention, a kernel that could draw random numbers, cannot be wrapped. So this pass is off where
  attention is recomputed.

Where copy engines all-gather the weights (distributed/copy_engine.py), ``collective_bucketing`` is
off: separate copies cost least, and nothing is concatenated. Where copy engines all-gather them
inside a stage, dtron's own pass replaces all of these (training/zero3_prefetch.py)."""


@dataclass(frozen=True)
class LocalWeights:
    """A stage's weights as its compiled functions take them.

    ``tree``: this rank's local tensors.
    ``lies``: the placements, shape and stride of each weight.
    ``entrance``: the part of them that ``enter`` takes."""

    tree: Any
    lies: list[ShardSpec]
    entrance: LocalWeights | None = None


class CompiledStage:
    """The compiled functions of a program, on local tensors of each rank. It is also their
    ``StageWeights`` (training/gradients.py)."""

    def __init__(
        self, functions: Program, layout: Layout, compile: Callable, compile_list: Callable
    ):
        self._functions, self._layout = functions, layout
        self._run, self._run_list = compile(self._traced), compile_list(self._traced_list)

    def enter(self, p: LocalWeights, batch: Any) -> Tensor:
        # The compiler traces, and at each call guards, every weight that a function takes.
        p = p.entrance
        assert p is not None
        return self._run(self._enter, p.tree, p.lies, (), (), *_apart(batch))[0]

    def stage(
        self, p: LocalWeights, x: Tensor, batch: Any, *before: Any
    ) -> tuple[Tensor, StageOutput | None]:
        return self._run(self._functions.stage, p.tree, p.lies, (x,), before, *_apart(batch))

    def _enter(self, p: Any, batch: Any) -> tuple[Tensor, None]:
        return self._functions.enter(p, batch), None

    def leaves(self, params: Any, once: bool) -> tuple[LocalWeights, list[Tensor]]:
        weights = flat(params)
        tensors, lies = [to_local(w) for w in weights], [ShardSpec.of(w) for w in weights]
        if once:
            of, layout = declared(params), self._layout
            ready = [d.frozen or layout.ready(w, *d.axes) for w, d in zip(weights, of, strict=True)]
            after = [
                at if there else replace(at, placements=layout.unsharded(*d.axes))
                for at, there, d in zip(lies, ready, of, strict=True)
            ]
            rest = [d for d, there in zip(of, ready, strict=True) if not there]
            gather = lambda ws: unshard_all(ws, rest, layout, once=True)
            tensors, lies = self._run_some(gather, tensors, lies, ready), after
        tensors = [t.detach().requires_grad_() for t in tensors]
        tree, part = unflatten(params, tensors), self._functions.enter_params
        placed = dict(zip(map(id, tensors), lies, strict=True))
        entrance = LocalWeights(part(tree), [placed[id(w)] for w in flat(part(tree))])
        return LocalWeights(tree, lies, entrance), tensors

    def reduce_scatter(
        self, weights: LocalWeights, grads: list[Tensor], params: list[DTensor]
    ) -> list[Tensor]:
        return self._move(reduce_scatter_all, grads, [at.gradient for at in weights.lies], params)

    def reduce(
        self, weights: LocalWeights, grads: list[Tensor], params: list[DTensor], scattered: bool
    ) -> list[DTensor]:
        lies = [at.gradient for at in weights.lies]
        if scattered:
            lies = [at.reduce_scattered(p.placements) for at, p in zip(lies, params, strict=True)]
        grads = self._move(reduce_grads, grads, lies, params)
        return [ShardSpec.of(p).whole(g, p.device_mesh) for g, p in zip(grads, params, strict=True)]

    def loss(self, total: Tensor) -> Tensor:
        return self._layout.from_local(total, "+tokens")

    def _move(
        self, fn: Callable, grads: list[Tensor], lies: list[ShardSpec], params: list[DTensor]
    ) -> list[Tensor]:
        """Run ``fn`` on the gradients that do not have the placements of their params yet."""
        goals = [(tuple(p.placements), self._layout.summed(p)) for p in params]
        there = [at.placements == goal for at, (goal, _) in zip(lies, goals, strict=True)]
        return self._run_some(fn, grads, lies, there, goals)

    def _run_some(
        self,
        fn: Callable,
        tensors: list[Tensor],
        lies: list[ShardSpec],
        there: list[bool],
        *args: list[Any],
    ) -> list[Tensor]:
        """Run the compiled ``fn`` on the tensors that are not ``there`` yet; return all tensors."""
        away = [i for i, done in enumerate(there) if not done]
        if not away:
            return tensors
        pick = lambda xs: [xs[i] for i in away]
        found = self._run_list(fn, pick(tensors), pick(lies), *map(pick, args))
        moved = dict(zip(away, found, strict=True))
        return [moved.get(i, x) for i, x in enumerate(tensors)]

    # The traced functions: local tensors in, DTensors inside, local tensors out.

    def _traced(
        self,
        fn: Callable,
        tree: Any,
        lies: list[ShardSpec],
        x: tuple[Tensor, ...],
        before: Sequence[Any],
        batch: Any,
        parts: Mapping[str, tuple[Tensor, ShardSpec]],
    ) -> tuple[Tensor, StageOutput | None]:
        here = self._layout.from_local
        mesh = self._layout.mesh
        assert mesh is not None
        batch = replace(batch, **{name: at.whole(part, mesh) for name, (part, at) in parts.items()})
        like = next(getattr(batch, name) for name in parts)
        whole = lambda w, at: LocalToDTensor.apply(
            w, like, code(at.placements), tuple(at.shape), at.stride
        )
        p = unflatten(tree, [whole(w, at) for w, at in zip(flat(tree), lies, strict=True)])
        before = [
            r and {name: here(part, "+tokens_sp") for name, part in r.items()} for r in before
        ]
        y, extra = fn(p, *(here(part, "tokens_sp", "act_embed") for part in x), batch, *before)
        if extra is None:
            return _own(y), None
        aux = None if extra.aux is None else _own(extra.aux)
        return _own(y), StageOutput(
            aux, {name: part.to_local() for name, part in extra.report.items()}
        )

    def _traced_list(
        self, fn: Callable, tensors: list[Tensor], lies: list[ShardSpec], *args: list[Any]
    ) -> list[Tensor]:
        mesh = self._layout.mesh
        assert mesh is not None
        wholes = [at.whole(t, mesh) for t, at in zip(tensors, lies, strict=True)]
        return [x.to_local() for x in fn(wholes, *args)]


def _own(y: DTensor) -> Tensor:
    """The local tensor of ``y``. On an axis where ``y`` is Partial, its gradient is Replicate: the
    gradient of the sum."""
    return y.to_local(
        grad_placements=[Replicate() if at.is_partial() else at for at in y.placements]
    )


def _apart(batch: Any) -> tuple[Any, dict[str, tuple[Tensor, ShardSpec]]]:
    """Split a batch into the batch without its tensors, and this rank's shard of each tensor with
    its ShardSpec."""
    tensors = {f.name: x for f in fields(batch) if isinstance(x := getattr(batch, f.name), DTensor)}
    parts = {name: (to_local(x), ShardSpec.of(x)) for name, x in tensors.items()}
    return replace(batch, **dict.fromkeys(tensors)), parts
