"""Time training steps of one case and print one JSON line.

    python bench/train.py --model bench-1.3b --rows 2 --seq-len 4096
    torchrun --nproc-per-node 2 bench/train.py --mesh dp=2 --zero 3 --model bench-1.3b --rows 2

A step is everything: gather, forward, backward, gradient norm, clipping, AdamW. Random tokens. The
median is of the last 12 steps, between marks in the device's stream: as in train.py, the host runs
ahead and nobody waits for a step to end. The first carries compilation and is reported by itself;
``--steps 1`` is for the peak of memory, and times nothing. FLOPs are those of ``flops_per_token``:
causal, no recomputation. Host time is what a step from an idle device takes until its last kernel
is launched, the median of 3. With --data batches come from a file, as in train.py, and the line has
the share of time that the host waited for them. Needs torch and numpy alone."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from turns import await_turn

from dtron.data import Indexed, Prefetch, Writer
from dtron.data.indexed import token_dtype
from dtron.data.sources import Packed
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.symmetric_memory import copy_engine_groups
from dtron.layers.attention_kernels import AttentionPath
from dtron.layers.context_parallel import Method
from dtron.model.batch import make_batch
from dtron.model.compute_config import Fp8, Recompute
from dtron.model.flops import flops_per_token, parameter_count
from dtron.model.presets import preset
from dtron.params import init
from dtron.runtime.config import DataConfig, RunConfig
from dtron.runtime.exit import Parser, run_cli
from dtron.runtime.launch import plan_run, start_ranks
from dtron.runtime.metrics import elapsed, mark, peak_memory_gib, peak_tflops
from dtron.tools.profile import Recorder, breakdown, rows, top
from dtron.training.build import build_step
from dtron.training.optim_config import build_optimizer
from dtron.training.optimizer import init_state, with_compute_copies


def main(argv: list[str]) -> int:
    o = arguments(argv)
    m = preset(o.model)
    m = replace(m, layers=o.layers or m.layers, context=max(m.context, o.seq_len))
    shape = MeshShape.parse(o.mesh, int(os.environ.get("WORLD_SIZE", 1)))
    config = RunConfig(
        mesh=o.mesh, zero=o.zero, model=m, recompute=o.recompute, recompute_budget=o.recompute_budget,
        micro_batch=o.rows, fp8=o.fp8, fp8_first_last=o.fp8_first_last, fp8_gather=o.fp8_gather,
        attention_kernel=o.attention_kernel, cp_method=o.cp_method, zigzag=o.zigzag,
        reduce_dtype=o.reduce_dtype, cuda_graph=o.cuda_graph,
        copy_engines="off" if o.no_copy_engines else "auto",
        batch=o.rows * o.microbatches * shape.data, data=DataConfig(seq_len=o.seq_len),
    )  # fmt: skip
    plan = plan_run(config)
    with start_ranks(config, plan) as pipe:
        report = measure(o, config, plan, pipe)
    if plan.main:
        print(json.dumps(report))
    return 0


def measure(o, config: RunConfig, plan, pipe) -> dict:
    m, spec, layout = config.model, pipe.spec, pipe.layout
    params = init(spec, m.dims(), 0, layout, plan.master, plan.device)
    opt = init_state(build_optimizer(config.optim), spec, params)
    opt = with_compute_copies(opt, params, spec, layout.compute)
    generator = torch.Generator(plan.device).manual_seed(0)
    ids = torch.randint(
        m.vocab, (config.batch, o.seq_len + 1), device=plan.device, generator=generator
    )
    place = partial(make_batch, layout=layout, depth=m.mtp.depth, zigzag=config.zigzags)
    batches = [place(r) for r in ids.split(plan.rows)]
    tokens, host, losses, waited = config.batch * o.seq_len, [], [], []
    ahead = reading(config, plan, o.steps) if o.data else None

    plan = replace(plan, compile=not o.eager, cuda_graph=plan.cuda_graph and not o.eager)
    one = build_step(config, plan, pipe, overlap=not o.no_overlap)

    def step(params, opt):  # with the batches of now
        loss, _, _, params, opt = one(params, opt, batches, tokens, 1e-4)
        return loss, params, opt

    marks = [mark(plan.device)]
    for _ in range(o.steps):
        if ahead is not None:
            ids = ahead.next().to(plan.device, non_blocking=True)
            batches = [place(r) for r in ids.split(plan.rows)]
            waited.append(ahead.waited)
        loss, params, opt = step(params, opt)
        marks.append(mark(plan.device))
        losses.append(loss)
        if len(losses) == 1:
            first = elapsed(marks[0], marks[1])  # waits for it, compilation and all
            await_turn(o.turn)
            marks[1] = mark(plan.device)
    times = [elapsed(a, b) for a, b in pairwise(marks[1:])][-12:]
    for _ in range(
        3 if times else 0
    ):  # a host that runs ahead of a busy device would in the end wait for it
        elapsed(marks[-1], mark(plan.device))
        start = time.perf_counter()
        loss, params, opt = step(params, opt)
        host.append(time.perf_counter() - start)
    if o.profile:
        recorder = Recorder(Path(o.profile), 2, plan.device, show)
        for _ in range(2):
            recorder.begin()
            loss, params, opt = step(params, opt)
            recorder.end()
    n, timed = plan.shape.size, {}
    if times:
        seconds, peak = statistics.median(times), peak_tflops(plan.device)
        tflops = tokens / seconds / n * flops_per_token(m, o.seq_len) / 1e12
        timed = {
            "tokens_per_s_per_gpu": round(tokens / seconds / n), "tflops_per_gpu": round(tflops, 1),
            "mfu": round(tflops / peak, 4) if peak else None, "step_ms": round(1e3 * seconds, 2),
            "host_ms": round(1e3 * statistics.median(host), 2),
        }  # fmt: skip
    return {
        "model": f"{o.model} of {o.layers} layers" if o.layers else o.model,
        "parameters": parameter_count(m), "mesh": str(plan.shape), "zero": config.zero,
        "rows": o.rows, "microbatches": o.microbatches, "seq_len": o.seq_len, "recompute": o.recompute,
        "recompute_budget": o.recompute_budget, "compiled": not o.eager,
         "dtype": str(plan.compute).removeprefix("torch."), "fp8": o.fp8,
        "fp8_first_last": o.fp8_first_last, "fp8_gather": o.fp8_gather,
        "attention_kernel": o.attention_kernel, "overlap": not o.no_overlap,
        "cuda_graph": plan.cuda_graph, "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if plan.device != "cpu" else "cpu",
        "torch": torch.__version__, **timed,
        "peak_memory_gib": round(peak_memory_gib(plan.device), 1), "first_step_s": round(first, 1),
        **({"reduce_dtype": "bfloat16"} if o.reduce_dtype == "bfloat16" else {}),
        **({"copy_engines": True} if copy_engine_groups(layout.mesh) else {}),
        **({"cp_method": o.cp_method, "zigzag": config.zigzags} if plan.shape.cp > 1 else {}),
        "loss_first": losses[0].item(), "loss_last": losses[-1].item(),
        "data_wait_ratio": round(sum(waited[-12:]) / sum(times), 5) if waited else None,
    }  # fmt: skip


def reading(config: RunConfig, plan, steps: int) -> Prefetch:
    """Every step's batch from a .bin/.idx of random tokens, written here and removed when it has
    been opened, read ahead as train.py does; with documents of 500 tokens on average."""
    random, m, s = np.random.default_rng(0), config.model, config.data.seq_len
    with tempfile.TemporaryDirectory() as folder:
        with Writer(Path(folder) / "tokens", token_dtype(m.vocab)) as out:
            while sum(out.lengths) < 2 * config.batch * s:
                for n in random.integers(1, 1000, 200):
                    out.document(random.integers(0, m.vocab, n))
        data = Indexed(Path(folder) / "tokens")
    source = Packed(data, 0, len(data), s, 0, steps * config.batch, m.vocab, False)

    def load(start: int) -> torch.Tensor:
        rows = torch.from_numpy(source.rows(start, config.batch).tokens)
        if plan.device == "cpu":
            return rows
        torch.cuda.set_device(plan.device)  # for this thread
        return rows.pin_memory()

    return Prefetch(load, range(0, steps * config.batch, config.batch))


def show(spans) -> None:
    """Where the step's time went, and its kernels by total time."""
    for part in rows(breakdown(spans)):
        print("{:<24} {:>9} ms {:>7}".format(*part))
    print("\n".join(top(spans, 25)))


def arguments(argv: list[str]) -> argparse.Namespace:
    p = Parser(description="Time training steps of one case; one JSON line.")
    p.add_argument("--model", default="bench-1.3b", help="a preset")
    p.add_argument("--mesh", default="")
    p.add_argument("--zero", type=int, default=1)
    p.add_argument("--recompute", default="none", choices=get_args(Recompute))
    p.add_argument("--recompute-budget", type=float, help="the share of activations to keep")
    p.add_argument("--reduce-dtype", default="float32", choices=("float32", "bfloat16"))
    p.add_argument("--fp8", default="none", choices=get_args(Fp8))
    p.add_argument(
        "--fp8-first-last", action="store_true", help="in the first and the last block too"
    )
    p.add_argument("--fp8-gather", action="store_true", help="weights of ZeRO-3 gathered in 8 bits")
    p.add_argument("--attention-kernel", default="auto", choices=get_args(AttentionPath))
    p.add_argument(
        "--cp-method", default="ring", choices=get_args(Method), help="attention over cp"
    )
    p.add_argument("--zigzag", default="auto", choices=("auto", "on", "off"))
    p.add_argument(
        "--no-overlap", action="store_true", help="leave collectives where they are written"
    )
    p.add_argument(
        "--no-copy-engines", action="store_true", help="NCCL gathers the weights of ZeRO-3"
    )
    p.add_argument(
        "--cuda-graph",
        default="auto",
        choices=("auto", "off"),
        help="off: launch every kernel from Python",
    )
    p.add_argument("--eager", action="store_true", help="do not compile")
    p.add_argument(
        "--data", action="store_true", help="read each step's batch from a .bin/.idx made here"
    )
    p.add_argument("--turn", default="", help="after the first step, wait until there is this file")
    p.add_argument(
        "--profile", default="", help="write a Chrome trace here, and print where its time went"
    )
    for name, default in (
        ("layers", 0),
        ("rows", 2),
        ("microbatches", 1),
        ("seq-len", 4096),
        ("steps", 20),
    ):
        p.add_argument(f"--{name}", type=int, default=default)
    return p.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
