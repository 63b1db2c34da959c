"""Time training steps of one case and print one JSON line.

    python bench/train.py --model bench-1.3b --rows 2 --seq-len 4096
    torchrun --nproc-per-node 2 bench/train.py --mesh dp=2 --zero 3 --model bench-1.3b --rows 2

A step is complete: weight gathers, forward, backward, gradient norm, clipping and AdamW. The tokens
are random.

- **Step time** is the median of the last 12 steps, measured with events in the device's stream. As
  in train.py, the host runs ahead and does not wait for the end of a step.
- **The first step** includes compilation and is reported separately. ``--steps 1`` measures peak
  memory and no times.
- **FLOPs** are counted by ``flops_per_token``: causal attention, no recomputation. A frozen weight
  counts 4 for each element and token, because it has no gradient.
- **Host time** is the time from an idle device to the launch of the step's last kernel, the median
  of 3.
- **--data** reads every batch from a file, as in train.py. The line then has the share of time that
  the host waited for batches.

Needs torch and numpy, nothing else."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step_flags import USUAL, arguments, model_name, run_config
from torch import Tensor
from turns import await_turn

from dtron.data import Indexed, Prefetch, Writer
from dtron.data.indexed import token_dtype
from dtron.data.sources import Packed
from dtron.distributed.symmetric_memory import copy_engine_groups
from dtron.model.batch import Batch, make_batch
from dtron.model.flops import flops_per_token, parameter_count
from dtron.params import init
from dtron.runtime.config import RunConfig
from dtron.runtime.exit import run_cli
from dtron.runtime.launch import plan_run, start_ranks
from dtron.runtime.metrics import elapsed, mark, peak_memory_gib, peak_tflops
from dtron.runtime.profiler import Recorder
from dtron.runtime.time_breakdown import breakdown, rows, top
from dtron.runtime.trace import Span
from dtron.training.build import build_step
from dtron.training.config import RunPlan
from dtron.training.optim_config import build_optimizer
from dtron.training.optimizer import init_state, stored_params, with_compute_copies
from dtron.training.pipeline import Pipeline

LEARNING_RATE = 1e-4


@dataclass
class Measured:
    """Measurements of one case.

    ``state``: GiB of weights, their copies and optimizer state (0 on a CPU).
    ``first``: seconds of the first step.
    ``steps``: seconds of each of the last 12 steps.
    ``host``: seconds in which the host launches a step, each from an idle device.
    ``waited``: seconds that the host waited for each batch; empty without ``--data``."""

    state: float = 0.0
    first: float = 0.0
    steps: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)


def main(argv: list[str]) -> int:
    o = arguments(argv)
    config = run_config(o, int(os.environ.get("WORLD_SIZE", 1)))
    plan = plan_run(config)
    with start_ranks(config, plan) as pipe:
        plan = replace(plan, compile=not o.eager, cuda_graph=plan.cuda_graph and not o.eager)
        measured = measure(o, config, plan, pipe)
        line = case(o, config, plan, pipe) | results(measured, config, plan)
    if plan.main:
        print(json.dumps(line))
    return 0


def measure(o: argparse.Namespace, config: RunConfig, plan: RunPlan, pipe: Pipeline) -> Measured:
    m, spec, layout = config.model, pipe.spec, pipe.layout
    params = init(spec, m.dims(), 0, layout, plan.master, plan.device)
    opt = init_state(build_optimizer(config.optim), spec, params)
    params = stored_params(params, spec, opt)
    opt = with_compute_copies(opt, params, spec, layout.compute)
    on_gpu = plan.device.startswith("cuda")
    state_gib = torch.cuda.memory_allocated() / 2**30 if on_gpu else 0.0
    generator = torch.Generator(plan.device).manual_seed(0)
    shape = (config.batch, o.seq_len + 1)
    ids = torch.randint(m.vocab, shape, device=plan.device, generator=generator)
    train_step = build_step(config, plan, pipe, overlap=not o.no_overlap)
    tokens, measured = config.batch * o.seq_len, Measured(state_gib)

    def split(ids: Tensor) -> list[Batch]:
        return [
            make_batch(r, layout, depth=m.mtp.depth, zigzag=config.zigzags)
            for r in ids.split(plan.rows)
        ]

    batches = split(ids)
    prefetch = reading(config, plan, o.steps) if o.data else None

    def step(params: Any, opt: Any) -> tuple[Tensor, Any, Any]:
        """Take a step with the current ``batches``."""
        loss, _, _, params, opt = train_step(params, opt, batches, tokens, LEARNING_RATE)
        return loss, params, opt

    marks = [mark(plan.device)]
    for _ in range(o.steps):
        if prefetch is not None:
            batches = split(prefetch.next().to(plan.device, non_blocking=True))
            measured.waited.append(prefetch.waited)
        loss, params, opt = step(params, opt)
        marks.append(mark(plan.device))
        measured.losses.append(loss)
        if len(measured.losses) == 1:
            measured.first = elapsed(marks[0], marks[1])  # waits for the first step
            await_turn(o.turn)
            marks[1] = mark(plan.device)
    measured.steps = [elapsed(a, b) for a, b in pairwise(marks[1:])][-12:]
    # Each step starts on an idle device: otherwise the host would wait for a full launch queue.
    for _ in range(3 if measured.steps else 0):
        elapsed(marks[-1], mark(plan.device))
        start = time.perf_counter()
        loss, params, opt = step(params, opt)
        measured.host.append(time.perf_counter() - start)
    if o.profile:
        recorder = Recorder(Path(o.profile), 2, plan.device, show)
        for _ in range(2):
            recorder.begin()
            loss, params, opt = step(params, opt)
            recorder.end()
    return measured


def case(o: argparse.Namespace, config: RunConfig, plan: RunPlan, pipe: Pipeline) -> dict[str, Any]:
    """Return what was measured, on which machine and when."""
    optional = {name: x for name, usual in USUAL.items() if (x := getattr(o, name)) != usual}
    if copy_engine_groups(pipe.layout.mesh) or any(pipe.slots.values()):
        optional["copy_engines"] = True
    if plan.shape.pp > 1:
        optional["pipeline.schedule"] = o.schedule
    if plan.shape.cp > 1:
        optional |= {"cp_method": o.cp_method, "zigzag": config.zigzags}
    return {
        "model": model_name(o),
        "parameters": parameter_count(config.model),
        "mesh": str(plan.shape),
        "zero": config.zero,
        "rows": o.rows,
        "microbatches": o.microbatches,
        "seq_len": o.seq_len,
        "recompute": o.recompute,
        "recompute_budget": o.recompute_budget,
        "compiled": plan.compile,
        "dtype": str(plan.compute).removeprefix("torch."),
        "fp8": o.fp8,
        "fp8_first_last": o.fp8_first_last,
        "fp8_gather": o.fp8_gather,
        "attention_kernel": o.attention_kernel,
        "overlap": not o.no_overlap,
        "cuda_graph": plan.cuda_graph,
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if plan.device != "cpu" else "cpu",
        "torch": torch.__version__,
        **optional,
    }


def results(measured: Measured, config: RunConfig, plan: RunPlan) -> dict[str, Any]:
    """Return speed, memory and losses. Times are left out if only the first step was run."""
    timed = {}
    if measured.steps:
        seconds, peak = statistics.median(measured.steps), peak_tflops(plan.device)
        per_gpu = config.batch * config.data.seq_len / seconds / plan.shape.size
        flops = flops_per_token(config.model, config.data.seq_len, config.lora)
        tflops = per_gpu * flops / 1e12
        timed = {
            "tokens_per_s_per_gpu": round(per_gpu),
            "tflops_per_gpu": round(tflops, 1),
            "mfu": round(tflops / peak, 4) if peak else None,
            "step_ms": round(1e3 * seconds, 2),
            "host_ms": round(1e3 * statistics.median(measured.host), 2),
        }
    wait = None
    if measured.waited:
        wait = round(sum(measured.waited[-12:]) / sum(measured.steps), 5)
    return timed | {
        "peak_memory_gib": round(peak_memory_gib(plan.device), 1),
        "state_gib": round(measured.state, 3),
        "first_step_s": round(measured.first, 1),
        "loss_first": measured.losses[0].item(),
        "loss_last": measured.losses[-1].item(),
        "data_wait_ratio": wait,
    }


def reading(config: RunConfig, plan: RunPlan, steps: int) -> Prefetch:
    """Return the batches of all steps, read ahead as in train.py.

    The batches come from a .bin/.idx of random tokens, in documents of 500 tokens on average. The
    files are written here, and removed once they are open."""
    random, m, s = np.random.default_rng(0), config.model, config.data.seq_len
    with tempfile.TemporaryDirectory() as folder:
        with Writer(Path(folder) / "tokens", token_dtype(m.vocab)) as out:
            while sum(out.lengths) < 2 * config.batch * s:
                for n in random.integers(1, 1000, 200):
                    out.document(random.integers(0, m.vocab, n))
        data = Indexed(Path(folder) / "tokens")
    source = Packed(data, range(len(data)), s, 0, steps * config.batch, m.vocab, False)

    def load(start: int) -> torch.Tensor:
        ids = torch.from_numpy(source.rows(start, config.batch).tokens)
        if plan.device == "cpu":
            return ids
        torch.cuda.set_device(plan.device)  # for this thread
        return ids.pin_memory()

    return Prefetch(load, range(0, steps * config.batch, config.batch))


def show(spans: Sequence[Span]) -> None:
    """Print the time breakdown of the step, and its kernels by total time."""
    for name, milliseconds, share in rows(breakdown(spans)):
        print(f"{name:<24} {milliseconds:>9} ms {share:>7}")
    print("\n".join(top(spans, 25)))


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
