"""How long a pipelined step takes, and how long it should: measured beside simulated.

    torchrun --nproc-per-node 2 bench/pipeline.py --model bench-1.3b --pp 2 --microbatches 8 --rows
    2

First each stage's F, B, I and W are timed alone on their own rank, with device events, and the
transfer of an activation between neighbours. With these times ``simulate`` says how long the step
must take at least, by this schedule. Then whole steps are timed: gather, pipeline, gradient norm,
clipping and optimizer, of which the simulation knows the pipeline only. One JSON line at the end.
Random tokens; needs torch and numpy alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from datetime import date, timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.autograd.graph import get_gradient_edge

sys.path.insert(0, str(Path(__file__).parents[1]))
from dtron.distributed.mesh_shape import MeshShape
from dtron.mesh import Layout, build_mesh, stage_mesh
from dtron.model.batch import make_batch
from dtron.model.flops import flops_per_token
from dtron.model.presets import preset
from dtron.params import flat, gather, init, tree_map
from dtron.rules import rules_for
from dtron.runtime.config import PipelineConfig, RunConfig
from dtron.runtime.exit import Parser, run_cli
from dtron.runtime.launch import same_on_all_ranks
from dtron.runtime.metrics import peak_memory_gib, peak_tflops
from dtron.schedules import SCHEDULES, simulate
from dtron.schedules.split_backward import backward, backward_input
from dtron.training.grad_norm import clip_scale, global_norm
from dtron.training.gradients import gradients
from dtron.training.optim_config import build_optimizer
from dtron.training.optimizer import UpdateScalars, apply_update, init_state
from dtron.training.pipeline import on_ranks, pipeline, program


def main(argv: list[str]) -> int:
    o = arguments(argv)
    gpu = torch.cuda.is_available()
    device = f"cuda:{os.environ['LOCAL_RANK']}" if gpu else "cpu"
    compute = torch.bfloat16 if gpu else torch.float32
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=300))
    shape = MeshShape.parse(
        f"pp={o.pp}", None if o.pp == dist.get_world_size() else dist.get_world_size()
    )
    m = preset(o.model)
    config = RunConfig(
        model=m,
        pipeline=PipelineConfig(o.schedule, layers=o.layers),
        batch=o.rows * o.microbatches,
    )
    mesh = build_mesh(shape, device.partition(":")[0])
    layout = Layout(stage_mesh(mesh), rules_for(1), compute if gpu else None)
    template = torch.empty(0, m.embed, dtype=compute, device=device)
    pipe = on_ranks(
        pipeline(config, shape, o.microbatches, config.data.seq_len, layout), mesh, template
    )
    same_on_all_ranks({"arguments": vars(o)})

    params = init(pipe.spec, m.dims(), 0, layout, torch.float32, device)
    optimizer, functions = build_optimizer(config.optim), program(m, layout)
    opt = init_state(optimizer, pipe.spec, params)
    g = torch.Generator(device).manual_seed(0)
    rows = torch.randint(
        m.vocab, (o.rows * o.microbatches, o.seq_len + 1), device=device, generator=g
    )
    batches = [make_batch(r, layout) for r in rows.chunk(o.microbatches)]
    tokens = rows.shape[0] * o.seq_len

    costs = {**stage_costs(pipe, functions, params, batches[0], template, o.repeats)}
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, costs)
    costs = {key: value for found in everyone for key, value in found.items()}
    time_of = lambda a: costs[a.stage, a.kind]
    line = simulate(pipe.table, time_of, transfer(pipe, batches[0]))

    times = []
    for _ in range(o.steps):
        begin = clock(device)
        _, grads, _ = gradients(functions, params, batches, tokens, pipe, 1)
        scale = clip_scale(global_norm(grads, pipe.spec, pipe.sum) / tokens, 1.0) / tokens
        middle = clock(device)
        scalars = UpdateScalars(1e-4, scale)
        params, opt = apply_update(optimizer, pipe.spec, params, grads, opt, scalars, layout)
        del grads
        times.append((middle - begin, clock(device) - begin))
    times = times[len(times) // 2 :]
    part, whole = (statistics.median(t[i] for t in times) for i in (0, 1))
    per_gpu = tokens / whole / dist.get_world_size()
    tflops, peak = per_gpu * flops_per_token(m, o.seq_len) / 1e12, peak_tflops(device)
    report = {
        "model": o.model, "pipeline.schedule": o.schedule, "pp": o.pp,
        "microbatches": o.microbatches, "rows": o.rows, "mesh": str(shape), "zero": 1,
        "seq_len": o.seq_len, "recompute": "none", "compiled": False,
        "dtype": str(compute).removeprefix("torch."), "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if gpu else "cpu", "torch": torch.__version__,
        "tokens_per_s_per_gpu": round(per_gpu), "tflops_per_gpu": round(tflops, 1),
        "mfu": round(tflops / peak, 4) if peak else None, "step_ms": round(1e3 * whole, 2),
        "pipeline_ms": round(1e3 * part, 2), "simulated_ms": round(1e3 * line.makespan, 2),
        "measured_over_simulated": round(part / line.makespan, 3), "bubble": round(line.bubble, 4),
        "costs_ms": {f"{kind}{stage}": round(1e3 * c, 3) for (stage, kind), c in sorted(costs.items())},
        "peak_memory_gib": round(peak_memory_gib(device), 1),
    }  # fmt: skip
    if dist.get_rank() == 0:
        print(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()
    return 0


def stage_costs(
    pipe, functions, params, batch, template, repeats: int
) -> dict[tuple[int, str], float]:
    """Seconds of every action of the stages here, alone, by (stage, kind); medians."""
    found = {}
    device = str(template.device)
    weights = tree_map(lambda w: w.detach().requires_grad_(), gather(params, pipe.layout))
    for stage, tree in zip(pipe.stages, weights, strict=True):
        samples: dict[str, list[float]] = {kind: [] for kind in "FBIW"}
        for _ in range(repeats):
            for halves in (False, True):
                x = template.new_ones(batch.tokens_T.shape[0], template.shape[1]).requires_grad_()
                start = clock(device)
                if stage == 0:
                    x = functions.enter(tree, batch).detach().requires_grad_()
                y, _ = functions.stage(tree, x, batch)
                samples["F"].append(clock(device) - start)
                g, edge, ws = [torch.ones_like(y)], [get_gradient_edge(y)], flat(tree)
                start = clock(device)
                _, later = (backward_input if halves else backward)(edge, x, ws, g)
                samples["I" if halves else "B"].append(clock(device) - start)
                start = clock(device)
                later()
                if halves:
                    samples["W"].append(clock(device) - start)
        found |= {(stage, kind): statistics.median(s[len(s) // 2 :]) for kind, s in samples.items()}
    return found


def transfer(pipe, batch) -> float:
    """Seconds to pass an activation on: half of a round trip between pipeline ranks 0 and 1."""
    message = pipe.template.new_zeros(batch.tokens_T.shape[0], pipe.template.shape[1])
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
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def arguments(argv: list[str]) -> argparse.Namespace:
    p = Parser(description="Time a pipelined step, and say how long it should take.")
    p.add_argument("--model", default="bench-1.3b", help="a preset")
    add = p.add_argument
    add("--pipeline.schedule", dest="schedule", default="1f1b", choices=list(SCHEDULES))
    add("--pipeline.layers", dest="layers", default="", help="blocks of each stage, as 12,12")
    for name, default in (
        ("pp", 2),
        ("microbatches", 8),
        ("rows", 2),
        ("seq-len", 4096),
        ("steps", 12),
    ):
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--repeats", type=int, default=6, help="of each action, timed alone")
    return p.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
