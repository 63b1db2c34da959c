"""The model split into pipeline stages, and the stages of this process with their links to other
ranks.

A stage is a ``Transformer`` that lacks most weights of the model. The first stage has the
embedding, the last stage has the final norm and the head, and each stage has its share of the
blocks. Weights keep their paths of the whole model (``blocks.7.mlp.w_up``). So initial weights and
checkpoints do not depend on the split. One device is a pipeline of one stage.

With a tied head, or with multi-token prediction, the first and the last stage each have a copy of
the embedding. The copy in the last stage is called a *twin*. The gradients of both copies are added
once a step, so the copies stay equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full, local
from dtron.errors import UserError
from dtron.mesh import Layout
from dtron.model.batch import Batch
from dtron.model.compute_config import PLAIN, ComputeConfig
from dtron.model.config import ModelConfig
from dtron.model.flops import active
from dtron.model.transformer import Transformer, declare_model, embed, embed_params, stage
from dtron.params import flat, tree_map
from dtron.schedules import Table, make
from dtron.schedules.p2p import InProcessLinks, Links, P2PLinks, PipelineGroups, make_ways
from dtron.schedules.runner import Program
from dtron.training.config import StepConfig


def layers_per_stage(
    m: ModelConfig, stages: int, seq_len: int, layers: Sequence[int] = ()
) -> list[int]:
    """The number of blocks of each stage.

    ``layers``: these numbers, from the user. Empty: the most even split by FLOPs, in which the head
    of the last stage counts as many blocks as it costs.

    Raises UserError for numbers that do not fit."""
    if layers:
        if len(layers) != stages or sum(layers) != m.layers or min(layers) < 1:
            raise UserError(
                f"--pipeline.layers {','.join(map(str, layers))}: must be {stages} positive numbers, one per "
                f"stage, that sum to model.layers={m.layers}; change it, or leave it out"
            )
        return list(layers)
    if stages > m.layers:
        raise UserError(
            f"{stages} pipeline stages for model.layers={m.layers}: each needs a block; use fewer stages "
            f"(pp, --pipeline.stages-per-rank) or --model.layers {stages}"
        )
    blocks = declare_model(m).blocks
    weights = sum(active(w, m) for w in flat(blocks)) / m.layers
    mixing = sum(m.mixer(p.letter).flops(seq_len, None) for p in blocks) / m.layers
    # The cost of an average block, in multiplications per token.
    block = weights + mixing / 6
    head = m.padded_vocab * m.embed / block  # in blocks
    head_cost = head + m.mtp.depth * (head + 1 + 2 * m.embed**2 / block)

    def fits(most: float) -> list[int] | None:
        """The largest number of blocks of each stage at a cost of at most ``most`` blocks. None if
        some blocks of the model are left over."""
        room = [max(1, math.floor(most + 1e-9))] * (stages - 1) + [
            max(1, math.floor(most - head_cost + 1e-9))
        ]
        return room if sum(room) >= m.layers else None

    lows = sorted({n + extra for n in range(1, m.layers + 1) for extra in (0.0, head_cost)})
    room = next(r for most in lows if (r := fits(most)))
    # Take surplus blocks from the stages of highest cost, later stages first: they start later.
    while sum(room) > m.layers:
        widest = max(
            range(stages),
            key=lambda s: (room[s] > 1, room[s] + (head_cost if s == stages - 1 else 0), s),
        )
        room[widest] -= 1
    return room


def cut(m: ModelConfig, layers: Sequence[int]) -> list[Transformer]:
    """The declared weights of each stage."""
    whole, found, start = declare_model(m), [], 0
    for s, n in enumerate(layers):
        first, last = s == 0, s == len(layers) - 1
        embedding = whole.embedding if first else None
        if last and not first and (m.tied or m.mtp.depth):
            twin = replace(whole.embedding.w_tokens, twin=True)
            embedding = replace(whole.embedding, w_tokens=twin, w_positions=None)
        found.append(
            replace(
                whole,
                embedding=embedding,
                blocks=whole.blocks[start : start + n],
                norm=whole.norm if last else None,
                w_head=whole.w_head if last else None,
                mtp=whole.mtp if last else (),
            )
        )
        start += n
    return found


def program(
    m: ModelConfig, layout: Layout, how: ComputeConfig = PLAIN, splits: bool = True
) -> Program:
    """The model's functions, as the schedule runner takes them."""
    return Program(
        partial(embed, m=m, layout=layout),
        partial(stage, m=m, layout=layout, how=how),
        splits and how.policy.splits,
        carries=m.moe.experts > 0 and m.moe.aux_loss > 0 and m.moe.aux_level == "global_batch",
        enter_params=embed_params,
    )


@dataclass(frozen=True)
class Pipeline:
    """The stages of this process.

    ``table``: the schedule.
    ``specs``: the declared weights of every stage.
    ``ways``: the process groups to the other pipeline ranks. None: all stages are in this process
    (one device, or simulated ranks).
    ``template``: a message of no tokens.
    ``met``: the kinds of messages that have been sent before, by functions that will be run
    again."""

    table: Table
    specs: tuple[Transformer, ...]
    layout: Layout
    ways: PipelineGroups | None = None
    template: Tensor | None = None
    met: set[Any] = field(default_factory=set, compare=False)

    @property
    def ranks(self) -> list[int]:
        return list(range(len(self.table.rows))) if self.ways is None else [self.ways.rank]

    @property
    def stages(self) -> list[int]:
        """The stages here, in the order of the params trees."""
        return sorted(s for r in self.ranks for s in self.table.stages_of(r))

    @property
    def spec(self) -> tuple[Transformer, ...]:
        """The declared weights of the stages here. Every params tree has this structure."""
        return tuple(self.specs[s] for s in self.stages)

    @property
    def twins(self) -> tuple[int, int] | None:
        """The two stages that each have a copy of the embedding; None if there is only one copy."""
        first, last = 0, self.table.stages - 1
        return None if first == last or self.specs[last].embedding is None else (first, last)

    def links(
        self, batch: Batch, table: Table | None = None, local: bool = False, by_host: bool = False
    ) -> Links:
        """The links between stages for one step of microbatches like ``batch``.

        ``local``: stages take and return local tensors of each rank, and no DTensors.
        ``by_host``: messages go by way of the hosts, because this step runs functions that other
        steps do not run. It does not count as the first step.

        On GPUs, the first step of a kind sends its messages by way of the hosts, too."""
        if self.ways is None:
            return InProcessLinks()
        t, tokens = table or self.table, batch.tokens_T.shape[0] // self.layout.parts("tokens_sp")
        kind, lies, device = (
            (t.name, tokens, local),
            ("tokens_sp", "act_embed"),
            self.template.device,
        )
        if not by_host:
            by_host = kind not in self.met
            self.met.add(kind)
        by_host = by_host and self.ways.host is not None
        there = torch.device("cpu") if by_host else device
        empty = lambda: self.template.new_empty(tokens, self.template.shape[1], device=there)
        wrap = lambda x: x.to(device) if local else self.layout.from_local(x.to(device), *lies)
        unwrap = lambda x: (x if local else self.layout.to_local(x, *lies)).to(there)
        return P2PLinks(t, self.ways, by_host, empty, wrap, unwrap)

    def add_twins(self, grads: tuple[Any, ...]) -> tuple[Any, ...]:
        """Add the gradients of the embedding's two copies, whichever ranks have them."""
        if self.twins is None:
            return grads
        first, last = self.twins
        trees = dict(zip(self.stages, grads, strict=True))
        of = lambda s: trees[s].embedding.w_tokens
        if first in trees and last in trees:
            total = of(first) + of(last)
            sums = {first: total, last: total.clone()}
        elif first in trees or last in trees:
            mine, other = (first, last) if first in trees else (last, first)
            here, there = self.table.rank_of[mine], self.table.rank_of[other]
            part, peer = local(of(mine)).contiguous(), self.ways.peers[there]
            theirs = torch.empty_like(part)
            works = [
                dist.isend(part, peer, group=self.ways.of[here, there]),
                dist.irecv(theirs, peer, group=self.ways.of[there, here]),
            ]
            for work in works:
                work.wait()
            local(of(mine)).add_(theirs)
            sums = {mine: of(mine)}
        else:
            return grads
        put = lambda tree, total: replace(tree, embedding=replace(tree.embedding, w_tokens=total))
        return tuple(put(tree, sums[s]) if s in sums else tree for s, tree in trees.items())

    def sum(self, value: Tensor | None) -> Tensor:
        """Sum a value over the pipeline ranks; None counts as 0."""
        if self.ways is None:
            return value
        value = torch.zeros((), device=self.template.device) if value is None else value
        box = value.to(torch.float64)
        dist.all_reduce(box, group=self.ways.line)
        return box

    def whole(self, trees: tuple[Any, ...], fn: Callable[[Tensor], Tensor] = full) -> Transformer:
        """One tree of the whole model from the trees of all stages, if all stages are here."""
        first, last = trees[0], trees[-1]
        blocks = tuple(b for tree in trees for b in tree.blocks)
        return tree_map(fn, replace(last, embedding=first.embedding, blocks=blocks))


def on_ranks(
    pipe: Pipeline, mesh: DeviceMesh | None, template: Tensor, timeout: timedelta | None = None
) -> Pipeline:
    """The same pipeline with its ranks as processes of ``mesh``. Every process must call this.

    ``template``: an activation of no tokens, ``[0, D]``, in the compute dtype."""
    if mesh is None or "pp" not in mesh.mesh_dim_names:
        return pipe
    lines = (
        mesh.mesh.movedim(mesh.mesh_dim_names.index("pp"), -1)
        .reshape(-1, len(pipe.table.rows))
        .tolist()
    )
    pairs = pipe.table.pairs
    if pipe.twins is not None:
        first, last = (pipe.table.rank_of[s] for s in pipe.twins)
        pairs |= {(first, last), (last, first)} if first != last else set()
    return replace(pipe, ways=make_ways(lines, pairs, template.device, timeout), template=template)


def one_stage(m: ModelConfig, microbatches: int, layout: Layout) -> Pipeline:
    """A pipeline of one stage: the whole model."""
    return Pipeline(make("1f1b", 1, microbatches), tuple(cut(m, [m.layers])), layout)


def pipeline(
    config: StepConfig, shape: MeshShape, microbatches: int, seq_len: int, layout: Layout
) -> Pipeline:
    """The pipeline of a config, with all its ranks in this process. Raises UserError for a config
    that is not possible."""
    t = make(config.pipeline.schedule, shape.pp, microbatches, config.pipeline.stages_per_rank)
    layers = layers_per_stage(config.model, t.stages, seq_len, config.pipeline.layer_counts)
    return Pipeline(t, tuple(cut(config.model, layers)), layout)
