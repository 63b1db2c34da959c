"""The pipeline stages of this process, with their links to other ranks.

One device is a pipeline of one stage. model/stages.py splits a model into stages.

With a tied head, or with multi-token prediction, the first and the last stage each have a copy of
the embedding. The copy in the last stage is called a *twin*. The gradients of both copies are added
once a step, so the copies stay equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dtron.distributed.host_memory import HostMemory
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full, to_local
from dtron.distributed.symmetric_memory import on_one_host, shared
from dtron.losses.objective import CROSS_ENTROPY, Objective
from dtron.mesh import Layout, axes_of
from dtron.model.batch import Batch
from dtron.model.compute_config import PLAIN, ComputeConfig
from dtron.model.config import ModelConfig
from dtron.model.lora import with_lora
from dtron.model.stages import layers_per_stage, split_into_stages
from dtron.model.transformer import Transformer, embed, embed_params, stage
from dtron.schedules import Table, make
from dtron.schedules.message_slots import MessageSlots, slots_needed
from dtron.schedules.p2p import (
    InProcessLinks,
    Links,
    P2PLinks,
    PipelineGroups,
    Progress,
    Recording,
    make_pipeline_groups,
)
from dtron.schedules.runner import Program
from dtron.training.config import StepConfig
from dtron.tree import tree_map


def program(
    m: ModelConfig,
    layout: Layout,
    how: ComputeConfig = PLAIN,
    splits: bool = True,
    objective: Objective = CROSS_ENTROPY,
) -> Program:
    """Return the model's functions, as the schedule runner takes them."""
    return Program(
        partial(embed, m=m, layout=layout),
        partial(stage, m=m, layout=layout, how=how, host=HostMemory(), objective=objective),
        splits and how.policy.splits,
        carries=m.moe.experts > 0 and m.moe.aux_loss > 0 and m.moe.aux_level == "global_batch",
        enter_params=embed_params,
    )


@dataclass(frozen=True)
class Pipeline:
    """The stages of this process.

    ``table``: the schedule.
    ``specs``: the declared weights of every stage of the model.
    ``groups``: the process groups to the other pipeline ranks. None: all stages are in this process
        (one device, or simulated ranks).
    ``template``: a message of no tokens.
    ``sent_kinds``: the kinds of messages that earlier steps have sent.
    ``progress``: counts the messages of a recorded step; None: nothing is recorded here.
    ``timeout``: how long a rank waits for another; None: no limit.
    ``copy_engines``: whether copy engines send the messages of a recorded step.
    ``slots``: for each number of microbatches, and of tokens in a message, the slots of messages to
        and from other pipeline ranks.
    ``tables``: the schedules of other numbers of microbatches, for a batch ramp."""

    table: Table
    specs: tuple[Transformer, ...]
    layout: Layout
    groups: PipelineGroups | None = None
    template: Tensor | None = None
    sent_kinds: set[Any] = field(default_factory=set, compare=False)
    progress: Progress | None = field(default=None, compare=False)
    timeout: timedelta | None = None
    copy_engines: bool = False
    slots: dict[tuple[int, int], dict[int, MessageSlots]] = field(
        default_factory=dict, compare=False
    )
    tables: tuple[Table, ...] = ()

    def for_count(self, microbatches: int) -> Pipeline:
        """Return the same pipeline with the schedule of a step of so many microbatches."""
        table = next((t for t in self.tables if t.microbatches == microbatches), self.table)
        return self if table is self.table else replace(self, table=table)

    @property
    def device(self) -> torch.device:
        """The device of messages. Only ranks in several processes send messages."""
        assert self.template is not None
        return self.template.device

    @property
    def ranks(self) -> list[int]:
        return list(range(len(self.table.rows))) if self.groups is None else [self.groups.rank]

    @property
    def stages(self) -> list[int]:
        """The numbers of this process's stages, in the order of the params trees."""
        return sorted(s for r in self.ranks for s in self.table.stages_of(r))

    @property
    def spec(self) -> tuple[Transformer, ...]:
        """The declared weights of this process's stages. Every params tree has this structure."""
        return tuple(self.specs[s] for s in self.stages)

    @property
    def twins(self) -> tuple[int, int] | None:
        """The two stages that each have a copy of the embedding; None if there is one copy."""
        first, last = 0, self.table.stages - 1
        return None if first == last or self.specs[last].embedding is None else (first, last)

    def links(self, batch: Batch, table: Table | None = None, by_host: bool = False) -> Links:
        """Make the links between stages for one step of microbatches like ``batch``. On GPUs, the
        first step of a kind sends its messages through the hosts.

        ``table``: the schedule of the step; None: the schedule of this pipeline.
        ``by_host``: messages go through the hosts, because this step runs functions that other
            steps do not run. It does not count as the first step."""
        if self.groups is None:
            return InProcessLinks()
        t, tokens = table or self.table, self._tokens(batch)
        axes, device, kind = ("tokens_sp", "act_embed"), self.device, (t.name, tokens)
        if not by_host:
            by_host = kind not in self.sent_kinds
            self.sent_kinds.add(kind)
        by_host = by_host and self.groups.host is not None
        sent_from = torch.device("cpu") if by_host else device

        def empty() -> Tensor:
            assert self.template is not None
            return self.template.new_empty(tokens, self.template.shape[1], device=sent_from)

        def wrap(x: Tensor) -> Tensor:
            return self.layout.from_local(x.to(device), *axes)

        def unwrap(x: Tensor) -> Tensor:
            return self.layout.to_local(x, *axes).to(sent_from)

        # A torch without CUDA cannot say whether anything is recorded.
        recording = None
        if self.progress is not None and torch.cuda.is_current_stream_capturing():
            recording = Recording(self.progress, self.slots.get((t.microbatches, tokens), {}))
        return P2PLinks(t, self.groups, by_host, empty, wrap, unwrap, recording)

    def prepare_recording(self, batch: Batch) -> None:
        """Make the slots for the messages of a step that is to be recorded. Ranks on different
        hosts have no slots. All ranks must call this."""
        tokens = self._tokens(batch)
        key = (self.table.microbatches, tokens)
        if self.groups is None or not self.copy_engines or key in self.slots:
            return
        assert self.template is not None
        made = self.slots[key] = {}
        rank, width, counts = self.groups.rank, self.template.shape[1], slots_needed(self.table)
        for pair in sorted({(min(pair), max(pair)) for pair in counts if rank in pair}):
            if not on_one_host([self.groups.peers[r] for r in pair]):
                continue
            group = self.groups.by_pair.get(pair) or self.groups.by_pair[pair[::-1]]
            count = max(counts.get(p, 0) for p in (pair, pair[::-1]))
            memory, buffer = shared(count * tokens * width * self.template.itemsize, group)
            messages = memory.view(self.template.dtype).view(count, tokens, width)
            made[sum(pair) - rank] = MessageSlots(messages, buffer, dist.get_rank(group))

    def _tokens(self, batch: Batch) -> int:
        """The number of tokens in a message."""
        return batch.tokens_T.shape[0] // self.layout.parts("tokens_sp")

    def awaited(self) -> str:
        """Say for which message a recorded step of this process waits."""
        awaited = None if self.progress is None else self.progress.next()
        if awaited is None:
            return "another rank has died or hangs"
        rank, stage = awaited
        return f"pipeline rank {rank} (stage {stage}) has died or hangs"

    def reduce_tied_embedding(self, grads: tuple[Any, ...]) -> tuple[Any, ...]:
        """Add the gradients of the embedding's two copies. The copies may be on one rank or on
        two."""
        if self.twins is None:
            return grads
        first, last = self.twins
        trees = dict(zip(self.stages, grads, strict=True))
        copies = {s: trees[s].embedding.w_tokens for s in self.twins if s in trees}
        copies = {s: g for s, g in copies.items() if g is not None}  # None if it is frozen
        if len(copies) == 2:
            total = copies[first] + copies[last]
            sums = {first: total, last: total.clone()}
        elif copies:
            assert self.groups is not None  # the other copy is in another process
            own, other = (first, last) if first in copies else (last, first)
            rank, peer_rank = self.table.rank_of[own], self.table.rank_of[other]
            sent, peer = to_local(copies[own]).contiguous(), self.groups.peers[peer_rank]
            received = torch.empty_like(sent)
            works = [
                dist.isend(sent, peer, group=self.groups.by_pair[rank, peer_rank]),
                dist.irecv(received, peer, group=self.groups.by_pair[peer_rank, rank]),
            ]
            for work in works:
                assert work is not None  # this process is in both groups
                work.wait()
            to_local(copies[own]).add_(received)
            sums = copies
        else:
            return grads
        for s, total in sums.items():
            embedding = replace(trees[s].embedding, w_tokens=total)
            trees[s] = replace(trees[s], embedding=embedding)
        return tuple(trees.values())

    def sum(self, value: Tensor | None) -> Tensor:
        """Sum a value over the pipeline ranks; None counts as 0."""
        return self._reduce(value, 0.0, dist.ReduceOp.SUM)

    def maximum(self, value: Tensor | None) -> Tensor:
        """Return the largest value of the pipeline ranks; None counts as -inf."""
        return self._reduce(value, float("-inf"), dist.ReduceOp.MAX)

    def _reduce(self, value: Tensor | None, neutral: float, op: Any) -> Tensor:
        if self.groups is None:
            assert value is not None  # all stages are here
            return value
        value = torch.full((), neutral, device=self.device) if value is None else value
        total = value.to(torch.float64)
        dist.all_reduce(total, op, group=self.groups.line)
        return total

    def whole(self, trees: tuple[Any, ...], fn: Callable[[Tensor], Tensor] = full) -> Transformer:
        """Merge the trees of all stages, which are all in this process, into one tree."""
        first, last = trees[0], trees[-1]
        blocks = tuple(b for tree in trees for b in tree.blocks)
        return tree_map(fn, replace(last, embedding=first.embedding, blocks=blocks))


def on_ranks(
    pipe: Pipeline,
    mesh: DeviceMesh | None,
    template: Tensor,
    timeout: timedelta | None = None,
    copy_engines: bool = True,
) -> Pipeline:
    """Return the same pipeline with the processes of ``mesh`` as its ranks. Every process must call
    this function.

    ``template``: an activation of no tokens, ``[0, D]``, in the compute dtype.
    ``copy_engines``: whether GPUs of one host send messages by copy engines."""
    if mesh is None or "pp" not in axes_of(mesh):
        return pipe
    ranks = mesh.mesh.movedim(axes_of(mesh).index("pp"), -1)
    lines = ranks.reshape(-1, len(pipe.table.rows)).tolist()
    pairs = pipe.table.pairs
    if pipe.twins is not None:
        first, last = (pipe.table.rank_of[s] for s in pipe.twins)
        pairs |= {(first, last), (last, first)} if first != last else set()
    groups = make_pipeline_groups(lines, pairs, template.device, timeout)
    progress = Progress(template.device) if template.device.type == "cuda" else None
    copies = copy_engines and progress is not None
    return replace(pipe, groups=groups, template=template, progress=progress, copy_engines=copies)


def one_stage(m: ModelConfig, microbatches: int, layout: Layout) -> Pipeline:
    """Make a pipeline of one stage: the whole model."""
    return Pipeline(make("1f1b", 1, microbatches), tuple(split_into_stages(m, [m.layers])), layout)


def pipeline(
    config: StepConfig,
    shape: MeshShape,
    microbatches: int,
    seq_len: int,
    layout: Layout,
    others: Sequence[int] = (),
) -> Pipeline:
    """Make the pipeline of a config, with all its ranks in this process. Raises UserError for an
    impossible config.

    ``others``: other numbers of microbatches that a step may have."""
    p = config.pipeline
    counts = dict.fromkeys((microbatches, *others))
    t, *tables = (make(p.schedule, shape.pp, n, p.stages_per_rank) for n in counts)
    layers = layers_per_stage(config.model, t.stages, seq_len, p.layer_counts)
    stages = tuple(with_lora(s, config.lora) for s in split_into_stages(config.model, layers))
    return Pipeline(t, stages, layout, tables=tuple(tables))
