"""The plan of a step: the program of each pipeline rank, run on fake tensors.

The program is the one that trains (training/build.py), with its declarations, its schedule, its
all-gathers and its compiled units. Weights, optimizer state and batches are made, one step runs,
and the trace has the memory and the operators of the second step: the first one compiles.

Left out: memory that is no tensor of the program, such as the workspaces of cuBLAS and the buffers
of NCCL (``gpu.Gpu.overhead``), and fragmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from dtron.mesh import Layout
from dtron.model.batch import Batch, make_batch
from dtron.params import init
from dtron.planner.fake_mesh import fake_mesh
from dtron.planner.operators import Operator
from dtron.planner.planned_pipeline import PlannedPipeline
from dtron.planner.rank_trace import Counting, RankTrace, fake_tensors
from dtron.rules import rules_for
from dtron.runtime.config import RunConfig
from dtron.schedules.runner import Program
from dtron.training.build import build_step
from dtron.training.config import RunPlan
from dtron.training.optim_config import build_optimizer
from dtron.training.optimizer import init_state, stored_params, with_compute_copies
from dtron.training.pipeline import Pipeline, pipeline

STATE = ("parameters", "optimizer", "copies")


@dataclass(frozen=True)
class RankPlan:
    """What one pipeline rank has and does in a step.

    ``state``: bytes of parameters, optimizer state and copies in the compute dtype.
    ``peak``: bytes by kind at the largest total of the step, the state included.
    ``host``: the most bytes in the host's memory.
    ``operators``: its kernels and messages, in order.
    ``groups``: the mesh axis of each process group."""

    rank: int
    stages: tuple[int, ...]
    state: dict[str, int]
    peak: dict[str, int]
    host: int
    operators: tuple[Operator, ...]
    groups: dict[str, str]

    @property
    def total(self) -> int:
        return sum(self.peak.values())


def plan_ranks(
    config: RunConfig, plan: RunPlan, ranks: Sequence[int] | None = None
) -> list[RankPlan]:
    """Return the plans of pipeline ranks (None: all of them).

    ``plan``: the config resolved for GPUs; see ``resolve``."""
    with fake_mesh(plan.shape) as mesh:
        layout = Layout(mesh, rules_for(config.zero), plan.compute, _reduce(config))
        pipe = pipeline(config, plan.shape, plan.count, config.data.seq_len, layout, plan.counts)
        groups: dict[str, str] = (
            {}
            if mesh is None
            else {mesh.get_group(i).group_name: name for i, name in enumerate(layout.axes)}
        )
        for name, group in layout.groups.items():
            groups.setdefault(group.args[0], name)
        shared: dict[str, Any] = {}
        wanted = range(len(pipe.table.rows)) if ranks is None else ranks
        return [_plan_rank(config, plan, pipe, rank, groups, shared) for rank in wanted]


def _plan_rank(
    config: RunConfig,
    plan: RunPlan,
    pipe: Pipeline,
    rank: int,
    groups: dict[str, str],
    shared: dict[str, Any],
) -> RankPlan:
    trace, m = RankTrace(), config.model
    with fake_tensors(trace):
        template = torch.empty(0, m.embed, dtype=plan.compute)
        own = {f.name: getattr(pipe, f.name) for f in fields(Pipeline)}
        planned = PlannedPipeline(**own | {"template": template}, rank=rank, trace=trace)
        with trace.making("batch"):
            batches = _batches(config, plan, pipe.layout)
        spec, memory = planned.spec, trace.memory
        with trace.making("parameters"):
            params = init(spec, m.dims(), config.seed, pipe.layout, plan.master)
        optimizer = build_optimizer(config.optim, m.mup)
        with trace.making("optimizer"):
            opt = init_state(optimizer, spec, params)
        params = stored_params(params, spec, opt)
        with trace.making("copies"):
            opt = with_compute_copies(opt, params, spec, pipe.layout.compute)
        state = {name: memory.live[name] for name in STATE}
        step = shared.get("step")
        if step is None:
            counting = Counting(trace)
            step = build_step(config, replace(plan, cuda_graph=False), planned, backend=counting)
            shared |= {"step": step, "counting": counting}
        shared["counting"].trace = trace
        step = replace(step, pipe=planned, functions=_marked(step.functions, trace))
        tokens = config.batch * config.data.seq_len

        def look(stage: int, microbatch: int, grads: Any) -> None:
            trace.mark("B")

        for _ in range(2):
            memory.begin()
            trace.operators.clear()
            weights = params if opt.compute_copies is None else opt.compute_copies
            results = [*step.gradients(weights, batches, look)]
            trace.mark("update")
            step.update(params, opt, results, tokens, 1e-4)
        return RankPlan(
            rank,
            tuple(planned.stages),
            state,
            dict(+memory.peak),
            memory.host,
            tuple(trace.operators),
            groups,
        )


def _marked(functions: Program, trace: RankTrace) -> Program:
    """Note in the trace where a stage's forward ends."""
    stage = functions.stage

    def marked(*args: Any) -> Any:
        result = stage(*args)
        trace.mark("F")
        return result

    return replace(functions, stage=marked)


def _weight(w: Any, layout: Layout, dtype: torch.dtype) -> Tensor:
    return layout.shard(torch.empty(w.shape, dtype=dtype), *w.axes)


def _batches(config: RunConfig, plan: RunPlan, layout: Layout) -> list[Batch]:
    rows = torch.empty(config.batch, config.data.seq_len + 1, dtype=torch.long)
    return [
        make_batch(r, layout, depth=config.model.mtp.depth, zigzag=config.zigzags)
        for r in rows.split(plan.rows)
    ]


def _reduce(config: RunConfig) -> torch.dtype | None:
    return torch.bfloat16 if config.reduce_dtype == "bfloat16" else None
