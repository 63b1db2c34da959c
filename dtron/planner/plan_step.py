"""The plan of a step: the program of each pipeline rank, run on fake tensors.

The program is the one that trains (training/build.py), with its declarations, its schedule, its
all-gathers and its compiled units. Weights, optimizer state and batches are made, and one step
runs.

The second model of a loss runs before the step, as in training. Left out for it: the waits of
pipeline ranks for each other.

Left out: fragmentation of memory, and memory that is no tensor of the program, such as workspaces
of cuBLAS and buffers of NCCL (``Gpu.overhead_gib``)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import torch
from torch import Tensor

from dtron.mesh import Layout
from dtron.model.batch import Batch, make_batch
from dtron.params import WeightSpec, init
from dtron.planner.fake_mesh import fake_mesh
from dtron.planner.operators import Operator, with_rows
from dtron.planner.planned_pipeline import MarkedTable, PlannedPipeline
from dtron.planner.rank_trace import Counting, RankTrace, fake_tensors
from dtron.rules import rules_for
from dtron.runtime.check_loss import second_config
from dtron.runtime.config import RunConfig
from dtron.runtime.second_memory import second_dtype
from dtron.training.build import build_step
from dtron.training.config import RunPlan
from dtron.training.optim_config import build_optimizer
from dtron.training.optimizer import init_state, stored_params, with_compute_copies
from dtron.training.pipeline import Pipeline, pipeline
from dtron.training.reference import Reference, build_reference
from dtron.training.step import TrainStep
from dtron.tree import fill

STATE = ("parameters", "optimizer", "copies")
SECOND = "second model"


@dataclass(frozen=True)
class RankPlan:
    """What one pipeline rank has and does in a step.

    ``state``: bytes of parameters, optimizer state, copies in the compute dtype, and the second
        model of the loss.
    ``peak``: bytes by kind at the largest total of the step, the state included.
    ``at_start``: the largest total while the state is made.
    ``host``: the most bytes in the host's memory.
    ``operators``: its kernels and messages, in order.
    ``groups``: the mesh axis of each process group."""

    rank: int
    stages: tuple[int, ...]
    state: dict[str, int]
    peak: dict[str, int]
    at_start: int
    host: int
    operators: tuple[Operator, ...]
    groups: dict[str, str]

    @property
    def largest(self) -> int:
        """The largest number of bytes at any time."""
        return max(self.at_start, sum(self.peak.values()))


def plan_ranks(config: RunConfig, plan: RunPlan, update: bool = True) -> list[RankPlan]:
    """Return the plans of all pipeline ranks.

    ``plan``: the config resolved for GPUs; see ``resolve`` in runtime/launch.py.
    ``update``: the step ends with the update of the weights, and not with the gradients."""
    step = _step_of(config, plan, update=update)
    return [step.on_rank(rank) for rank in range(len(step.pipe.table.rows))]


def plan_rank(config: RunConfig, plan: RunPlan, rank: int) -> RankPlan:
    """Return the plan of one rank of the mesh: the same rank of its pipeline rank's stages.

    ``rank``: its number in the whole mesh."""
    stage, place = divmod(rank, plan.shape.size // plan.shape.pp)
    return _step_of(config, plan, place).on_rank(stage)


def _step_of(config: RunConfig, plan: RunPlan, place: int = 0, update: bool = True) -> _Step:
    """Return the step of a config.

    ``place``: the rank among those of a pipeline stage."""
    mesh = fake_mesh(plan.shape, place)
    reduce = torch.bfloat16 if config.reduce_dtype == "bfloat16" else None
    compute = None if plan.compute == plan.master else plan.compute
    layout = Layout(mesh, rules_for(config.zero), compute, reduce)
    pipe = pipeline(config, plan.shape, plan.count, config.data.seq_len, layout, plan.counts)
    return _Step(config, plan, pipe, update)


@dataclass
class _Step:
    """A step, whose compiled functions all pipeline ranks share.

    ``update``: whether it ends with the update of the weights.
    ``counting``: its code generator; None: it is not built yet."""

    config: RunConfig
    plan: RunPlan
    pipe: Pipeline
    update: bool = True
    counting: Counting | None = None
    built: TrainStep | None = field(default=None, init=False)

    def on_rank(self, rank: int) -> RankPlan:
        trace, m = RankTrace(), self.config.model
        with fake_tensors(trace):
            pipe = self._pipeline(rank, trace)
            spec, memory, layout = pipe.spec, trace.memory, pipe.layout
            with trace.making("batch"):
                batches = self._batches(layout)
            with trace.making("parameters"):
                params = init(spec, m.dims(), self.config.seed, layout, self.plan.master)
            optimizer = build_optimizer(self.config.optim, m.mup)
            with trace.making("optimizer"):
                opt = init_state(optimizer, spec, params)
                params = stored_params(params, spec, opt)
            with trace.making("copies"):
                opt = with_compute_copies(opt, params, spec, layout.compute)
            with trace.making(SECOND):
                second = self._second_model(pipe)
            state = {name: memory.live[name] for name in (*STATE, SECOND)}
            at_start, step = memory.largest, self._step(pipe, trace)
            tokens = self.plan.count * self.plan.rows * self.config.data.seq_len
            memory.begin()
            trace.operators.clear()
            weights = params if opt.compute_copies is None else opt.compute_copies
            if second is not None:
                batches = second.attach(weights, batches)
                # The marks and the messages of the step have the same names.
                kept = [op for op in trace.operators if op.kind not in ("mark", "message")]
                trace.operators[:] = kept
            results = [*step.gradients(weights, batches)]
            trace.mark("reduce")
            if self.update:
                step.update(params, opt, results, tokens, 1e-4)
        return RankPlan(
            rank=rank,
            stages=tuple(pipe.stages),
            state=state,
            peak=dict(+memory.peak),
            at_start=at_start,
            host=memory.host,
            operators=tuple(with_rows(op, self._expert_rows) for op in trace.operators),
            groups=_axes_of_groups(layout),
        )

    def _pipeline(self, rank: int, trace: RankTrace) -> PlannedPipeline:
        template = torch.empty(0, self.config.model.embed, dtype=self.plan.compute)
        t = self.pipe.table
        table = MarkedTable(t.name, t.stages, t.microbatches, t.rows, rank, trace)
        own = {f.name: getattr(self.pipe, f.name) for f in fields(Pipeline)}
        own |= {"template": template, "table": table}
        return PlannedPipeline(**own, rank=rank, trace=trace)

    def _second_model(self, pipe: PlannedPipeline) -> Reference | None:
        """Return the second model of the loss, with the placements of runtime/second_model.py."""
        config, plan = self.config, self.plan

        def load(own: Pipeline) -> Any:
            def place(w: WeightSpec) -> Tensor:
                x = torch.empty(w.shape, dtype=second_dtype(w, plan.compute, plan.master))
                return own.layout.shard(x, *w.axes)

            return fill(own.spec, place)

        m, seq_len = second_config(config), config.data.seq_len
        return build_reference(config, m, pipe, plan, seq_len, load)

    def _step(self, pipe: PlannedPipeline, trace: RankTrace) -> TrainStep:
        """Return the step of a rank, with the functions that the first rank has compiled."""
        if self.counting is None:
            self.counting = Counting(trace)
            plan = replace(self.plan, cuda_graph=False)  # a recorded step has the same operators
            self.built = cast(TrainStep, build_step(self.config, plan, pipe, self.counting))
        assert self.built is not None
        self.counting.trace = trace
        return replace(self.built, pipe=pipe)

    def _batches(self, layout: Layout) -> list[Batch]:
        m, data = self.config.model, self.config.data
        shape, sequences = (self.plan.rows, data.seq_len), self.config.loss.objective.sequences

        def batch() -> Batch:
            rows = torch.empty(shape[0], shape[1] + 1, dtype=torch.long)
            masked = data.document_mask or sequences
            documents = torch.empty(shape, dtype=torch.long) if masked else None
            depth, zigzag = m.mtp.depth, self.config.zigzags
            return make_batch(
                rows, layout, documents, depth=depth, zigzag=zigzag, sequences=sequences
            )

        return [batch() for _ in range(self.plan.count)]

    @property
    def _expert_rows(self) -> int:
        """The rows that one rank's experts get in a microbatch, if tokens are spread evenly."""
        shape, moe = self.plan.shape, self.config.model.moe
        ranks = shape.dp_replicate * shape.dp * shape.cp * shape.tp // shape.etp
        return self.plan.rows * self.config.data.seq_len * moe.top_k // ranks


def _axes_of_groups(layout: Layout) -> dict[str, str]:
    mesh = layout.mesh
    groups: dict[str, str] = {}
    if mesh is not None:
        groups |= {str(mesh.get_group(i).group_name): name for i, name in enumerate(layout.axes)}
    for name, group in layout.groups.items():
        groups.setdefault(str(group.args[0]), name)
    return groups
