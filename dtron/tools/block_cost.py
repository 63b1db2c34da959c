"""The cost of one block of a model, for each way to split it, for the search of plan_search.py.

A small model is planned on four pipeline ranks, without the update. The third rank has one more
period of the model's blocks than the second. Their difference is a block's forward, backward and
kept bytes for one sequence. The rest of the first and of the last rank is the embedding and the
head."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dtron.distributed.mesh_shape import MeshShape
from dtron.planner.gpu_rates import Gpu
from dtron.planner.plan_step import RankPlan, plan_ranks
from dtron.planner.step_time import time_step
from dtron.runtime.config import PipelineConfig, RunConfig
from dtron.runtime.launch import resolve


@dataclass(frozen=True)
class BlockCost:
    """The cost of one sequence on one rank.

    ``forward``, ``backward``: seconds of one block.
    ``ends``: seconds of embedding and head, forward and backward.
    ``kept``: bytes that one block keeps for backward.
    ``working``: bytes beside weights and kept activations."""

    forward: float
    backward: float
    ends: float
    kept: float
    working: float


def block_cost(config: RunConfig, gpu: Gpu, shape: MeshShape, recompute: str) -> BlockCost:
    """Return the cost of a block that is split over the axes of a mesh but dp and pp."""
    m = config.model
    dp = shape.ep * shape.etp // math.gcd(shape.ep * shape.etp, shape.cp * shape.tp)
    inner = MeshShape(pp=4, dp=dp, cp=shape.cp, tp=shape.tp, ep=shape.ep, etp=shape.etp)
    period = len(m.pattern)
    first = period + (m.moe.dense_layers if m.moe.experts else 0)
    layers = (first, period, 2 * period, period)
    c = replace(
        config,
        mesh=str(inner),
        zero=0,
        model=replace(m, layers=sum(layers)),
        batch=inner.data,
        micro_batch=1,
        recompute=recompute,
        pipeline=PipelineConfig(layers=",".join(map(str, layers))),
    )
    plan, _ = resolve(c, inner, "cuda")
    ranks = plan_ranks(c, plan, update=False)
    times = [_alone(rank, inner, gpu) for rank in ranks]
    (f1, b1), (f2, b2) = times[1:3]
    forward, backward = (f2 - f1) / period, (b2 - b1) / period
    kept = (_kept(ranks[2]) - _kept(ranks[1])) / period
    blocks = sum(layers) * (forward + backward)
    ends = sum(map(sum, times)) - blocks
    working = max(
        rank.largest - sum(rank.state.values()) - n * kept
        for rank, n in zip(ranks, layers, strict=True)
    )
    return BlockCost(forward, backward, ends, kept, working)


def _alone(rank: RankPlan, shape: MeshShape, gpu: Gpu) -> tuple[float, float]:
    """Return the seconds of forward and backward of a rank that waits for no other stage."""
    operators = tuple(op for op in rank.operators if op.kind != "message")
    (time,) = time_step([replace(rank, operators=operators)], shape, gpu)
    forward = time.spans[0].end
    return forward, time.spans[1].end - forward


def _kept(rank: RankPlan) -> int:
    return rank.peak.get("activations", 0)
