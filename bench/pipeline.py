"""Time a pipelined training step and compare it with the simulated step.

    torchrun --nproc-per-node 2 bench/pipeline.py --model bench-1.3b --pp 2 --microbatches 8

1. Each rank times every action (F, B, I, W) of its own stages alone.
2. Ranks 0 and 1 time the transfer of an activation between them.
3. ``simulate`` computes from these times the least time that the schedule needs.
4. Whole training steps are timed. A step is what ``build_step`` makes, run eagerly: gradients,
   gradient norm, clipping and optimizer. The simulation covers the gradients only.

Prints one JSON line. The tokens are random. Needs torch and numpy, nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.graph import get_gradient_edge

from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.model.batch import Batch, make_batch
from dtron.model.flops import flops_per_token
from dtron.model.presets import preset
from dtron.params import init, unshard
from dtron.runtime.config import DataConfig, PipelineConfig, RunConfig
from dtron.runtime.exit import Parser, run_cli
from dtron.runtime.launch import plan_run, same_on_all_ranks, start_ranks
from dtron.runtime.metrics import peak_memory_gib, peak_tflops
from dtron.schedules import SCHEDULES, simulate
from dtron.schedules.runner import Program
from dtron.schedules.split_backward import backward, backward_input
from dtron.schedules.table import Action, Timeline
from dtron.training.build import build_step
from dtron.training.config import RunPlan
from dtron.training.optimizer import init_state, with_compute_copies
from dtron.training.pipeline import Pipeline
from dtron.training.step import TrainStep
from dtron.tree import flat, tree_map

LEARNING_RATE = 1e-4
StageCosts = dict[tuple[int, str], float]  # seconds, by stage and kind of action


def main(argv: list[str]) -> int:
    o = arguments(argv)
    config = run_config(o)
    plan = plan_run(config)
    with start_ranks(config, plan) as pipe:
        same_on_all_ranks({"arguments": vars(o)})
        report = measure(o, config, plan, pipe)
    if plan.main:
        print(json.dumps(report))
    return 0


def run_config(o: argparse.Namespace) -> RunConfig:
    m = preset(o.model)
    shape = MeshShape.parse(f"pp={o.pp}", int(os.environ.get("WORLD_SIZE", 1)))
    return RunConfig(
        mesh=str(shape),
        model=replace(m, context=max(m.context, o.seq_len)),
        pipeline=PipelineConfig(o.schedule, layers=o.layers),
        batch=o.rows * o.microbatches * shape.data,
        micro_batch=o.rows,
        compile="off",
        data=DataConfig(seq_len=o.seq_len),
    )


def measure(
    o: argparse.Namespace, config: RunConfig, plan: RunPlan, pipe: Pipeline
) -> dict[str, Any]:
    """Time the actions, the transfer and whole steps, and return the report."""
    m, layout = config.model, pipe.layout
    step = build_step(config, plan, pipe)
    params = init(pipe.spec, m.dims(), 0, layout, plan.master, plan.device)
    opt = init_state(step.optimizer, pipe.spec, params)
    opt = with_compute_copies(opt, params, pipe.spec, layout.compute)
    weights = params if opt.compute_copies is None else opt.compute_copies
    g = torch.Generator(plan.device).manual_seed(0)
    rows = torch.randint(m.vocab, (config.batch, o.seq_len + 1), device=plan.device, generator=g)
    batches = [make_batch(r, layout) for r in rows.split(plan.rows)]

    costs = costs_of_all_ranks(stage_costs(pipe, step.functions, weights, batches[0], o.repeats))

    def time_of(action: Action) -> float:
        return costs[action.stage, action.kind]

    timeline = simulate(pipe.table, time_of, transfer_seconds(pipe, batches[0]))
    tokens = config.batch * o.seq_len
    pipeline_seconds, step_seconds = time_steps(step, params, opt, batches, tokens, o.steps)
    return (
        case(o, config, plan)
        | speed(tokens / step_seconds / plan.shape.size, config, plan.device)
        | {"step_ms": round(1e3 * step_seconds, 2)}
        | compared(pipeline_seconds, timeline, costs)
        | {"peak_memory_gib": round(peak_memory_gib(plan.device), 1)}
    )


def case(o: argparse.Namespace, config: RunConfig, plan: RunPlan) -> dict[str, Any]:
    """Return what was measured, on which machine and when."""
    return {
        "model": o.model,
        "pipeline.schedule": o.schedule,
        "pp": o.pp,
        "microbatches": o.microbatches,
        "rows": o.rows,
        "mesh": config.mesh,
        "zero": config.zero,
        "seq_len": o.seq_len,
        "recompute": config.recompute,
        "compiled": plan.compile,
        "dtype": str(plan.compute).removeprefix("torch."),
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if plan.device != "cpu" else "cpu",
        "torch": torch.__version__,
    }


def speed(tokens_per_second: float, config: RunConfig, device: str) -> dict[str, Any]:
    """Return the throughput of one GPU."""
    flops = flops_per_token(config.model, config.data.seq_len)
    tflops, peak = tokens_per_second * flops / 1e12, peak_tflops(device)
    return {
        "tokens_per_s_per_gpu": round(tokens_per_second),
        "tflops_per_gpu": round(tflops, 1),
        "mfu": round(tflops / peak, 4) if peak else None,
    }


def compared(seconds: float, timeline: Timeline, costs: StageCosts) -> dict[str, Any]:
    """Return the measured time of the pipeline beside the simulated time."""
    return {
        "pipeline_ms": round(1e3 * seconds, 2),
        "simulated_ms": round(1e3 * timeline.makespan, 2),
        "measured_over_simulated": round(seconds / timeline.makespan, 3),
        "bubble": round(timeline.bubble, 4),
        "costs_ms": {
            f"{kind}{stage}": round(1e3 * cost, 3) for (stage, kind), cost in sorted(costs.items())
        },
    }


def time_steps(
    step: TrainStep, params: Any, opt: Any, batches: list[Batch], tokens: int, steps: int
) -> tuple[float, float]:
    """Return the seconds of a step's gradients and of the whole step, medians of the later half."""
    device, times = str(batches[0].tokens_T.device), []
    for _ in range(steps):
        start = clock(device)
        weights = params if opt.compute_copies is None else opt.compute_copies
        done = [*step.gradients(weights, batches)]
        middle = clock(device)
        _, _, _, params, opt = step.update(params, opt, done, tokens, LEARNING_RATE)
        times.append((middle - start, clock(device) - start))
    late = times[len(times) // 2 :]
    return statistics.median(t[0] for t in late), statistics.median(t[1] for t in late)


def stage_costs(
    pipe: Pipeline, functions: Program, weights: Any, batch: Batch, repeats: int
) -> StageCosts:
    """Time every action of this rank's stages alone; medians of the later half."""
    costs: StageCosts = {}
    device = str(batch.tokens_T.device)
    trees = tree_map(as_leaf, unshard(weights, pipe.layout))
    for stage, tree in zip(pipe.stages, trees, strict=True):
        samples: dict[str, list[float]] = {kind: [] for kind in "FBIW"}
        for _ in range(repeats):
            for splits in (False, True):
                x = activation(pipe, batch).requires_grad_()
                start = clock(device)
                if stage == 0:
                    x = functions.enter(tree, batch).detach().requires_grad_()
                y, _ = functions.stage(tree, x, batch)
                samples["F"].append(clock(device) - start)
                grad_y, edge, ws = [torch.ones_like(y)], [get_gradient_edge(y)], flat(tree)
                start = clock(device)
                _, weight_grads = (backward_input if splits else backward)(edge, x, ws, grad_y)
                samples["I" if splits else "B"].append(clock(device) - start)
                start = clock(device)
                weight_grads()
                if splits:
                    samples["W"].append(clock(device) - start)
        costs |= {(stage, kind): statistics.median(s[len(s) // 2 :]) for kind, s in samples.items()}
    return costs


def as_leaf(w: torch.Tensor) -> torch.Tensor:
    return w.detach().requires_grad_()


def activation(pipe: Pipeline, batch: Batch) -> torch.Tensor:
    """Return an activation of ones, ``[T, D]``."""
    return pipe.template.new_ones(batch.tokens_T.shape[0], pipe.template.shape[1])


def costs_of_all_ranks(costs: Mapping[tuple[int, str], float]) -> StageCosts:
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, dict(costs))
    return {key: value for of_rank in everyone for key, value in of_rank.items()}


def transfer_seconds(pipe: Pipeline, batch: Batch) -> float:
    """Time the transfer of an activation: half of a round trip between pipeline ranks 0 and 1."""
    message = activation(pipe, batch)
    device, ways, trips, times = str(message.device), pipe.groups, 6, []
    for _ in range(trips):
        dist.barrier(group=ways.line)
        start = clock(device)
        if ways.rank == 0:
            dist.send(message, ways.peers[1], group=ways.of[0, 1])
            dist.recv(message, ways.peers[1], group=ways.of[1, 0])
        elif ways.rank == 1:
            dist.recv(message, ways.peers[0], group=ways.of[0, 1])
            dist.send(message, ways.peers[0], group=ways.of[1, 0])
        times.append((clock(device) - start) / 2)
    box: list = [statistics.median(times[trips // 2 :])]
    dist.broadcast_object_list(box, src=ways.peers[0], group=ways.line)
    return box[0]


def clock(device: str) -> float:
    """Return the time in seconds when the device has finished its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def arguments(argv: list[str]) -> argparse.Namespace:
    p = Parser(description="Time a pipelined step and compare it with the simulated step.")
    add = p.add_argument
    add("--model", default="bench-1.3b", help="name of a preset (bench-1.3b)")
    add("--pipeline.schedule", dest="schedule", default="1f1b", choices=list(SCHEDULES))
    add("--pipeline.layers", dest="layers", default="", help="blocks of each stage, as 12,12")
    add("--pp", type=int, default=2, help="pipeline ranks (2)")
    add("--microbatches", type=int, default=8, help="microbatches per step (8)")
    add("--rows", type=int, default=2, help="sequences per microbatch and data rank (2)")
    add("--seq-len", type=int, default=4096, help="tokens per sequence (4096)")
    add("--steps", type=int, default=12, help="timed steps (12)")
    add("--repeats", type=int, default=6, help="repeats of each action that is timed alone (6)")
    o = p.parse_args(argv)
    if o.pp < 2:
        raise UserError(f"--pp {o.pp}: one rank is no pipeline; use --pp 2")
    return o


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
