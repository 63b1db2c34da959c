"""Plans a step on any mesh, without a GPU: memory, time and messages.

    dtron plan --model llama3-8b --mesh dp=8 --zero 3 --batch 64 --micro-batch 1
    dtron plan --model llama3-70b --mesh dp=32,tp=8,pp=4 --batch 1024 --token-budget 15T

It takes all flags of train.py. The program of every pipeline rank runs on tensors without numbers
(planner/plan_step.py), so a plan is a reading of the code that trains, and takes seconds. Times
come from the rates of a GPU, measured once (planner/gpu_rates.py). ``--gpu`` is a name or a file.

A plan assumes what train.py chooses on GPUs: compiled units, a recorded step, and bfloat16.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.planner.gpu_rates import load_gpu
from dtron.planner.plan_step import plan_ranks
from dtron.planner.report import (
    StepPlan,
    communication_table,
    memory_table,
    summary,
    time_table,
)
from dtron.planner.step_time import link_of, time_step
from dtron.rules import zero_axes
from dtron.runtime.config import RunConfig
from dtron.runtime.launch import resolve
from dtron.training.batch_ramp import UNITS


@dataclass(frozen=True)
class PlanConfig(RunConfig):
    """Plan memory, time and messages of a training step on any mesh. No GPU is needed."""

    gpu: str = "h200"
    """rates of a GPU: a name, as h200, or a file that bench/calibrate.py has written"""
    token_budget: str = ""
    """tokens of the whole run, as 15T; prints days and GPU-hours"""
    json: bool = False
    """print one line of JSON in place of the tables"""


def plan_config(config: RunConfig, gpu_name: str = "h200") -> StepPlan:
    """Plan a step. Raises UserError for an invalid config."""
    gpu, shape = load_gpu(gpu_name), MeshShape.parse(config.mesh)
    plan, _ = resolve(config, shape, "cuda")
    if not plan.compile or config.compile == "off":
        raise UserError("--compile off: a plan is of a compiled step; drop --compile")
    logging.getLogger("torch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ranks = plan_ranks(config, plan)
    copies = config.zero == 3 and config.copy_engines == "auto"
    copies &= any(link_of(shape, axis, gpu) == "nvlink" for axis in zero_axes(tuple(shape.atoms)))
    times = time_step(ranks, shape, gpu, copies)
    tokens = plan.count * plan.rows * config.data.seq_len
    return StepPlan(config, shape, gpu, ranks, times, tokens, copies)


def as_json(plan: StepPlan) -> str:
    """Return the plan as one line."""
    return json.dumps(
        {
            "mesh": str(plan.shape),
            "gpu": plan.gpu.name,
            "fits": plan.fits,
            "memory_gib": round(plan.gib, 3),
            "step_ms": round(1e3 * plan.seconds, 3),
            "tokens_per_s_per_gpu": round(plan.tokens_per_second),
            "tflops_per_gpu": round(plan.tflops, 1),
            "ranks": [
                {
                    "rank": r.rank,
                    "stages": r.stages,
                    "peak_bytes": r.peak,
                    "at_start_bytes": r.at_start,
                    "host_bytes": r.host,
                    "busy_ms": {k: round(1e3 * s, 3) for k, s in t.busy.items()},
                    "exposed_ms": {k: round(1e3 * s, 3) for k, s in t.exposed.items()},
                    "hidden_ms": {k: round(1e3 * s, 3) for k, s in t.hidden.items()},
                    "sent_bytes": {k: round(n) for k, n in t.sent.items()},
                    "bubble_ms": round(1e3 * t.bubble, 3),
                }
                for r, t in zip(plan.ranks, plan.times, strict=True)
            ],
        }
    )


def token_count(text: str) -> float:
    """Read a number of tokens such as 15T. Raises UserError for any other text."""
    number, unit = (text[:-1], UNITS[text[-1]]) if text[-1:] in UNITS else (text, 1)
    try:
        count = float(number) * unit
    except ValueError:
        count = 0.0
    if not 0 < count < 1e18:
        raise UserError(f"--token-budget {text}: a number of tokens, as 15T, 300B or 2e9")
    return count


def main(argv: Sequence[str]) -> int:
    from dtron.runtime.cli import parse

    config = parse(argv, PlanConfig(), prog="dtron plan")
    budget = token_count(config.token_budget) if config.token_budget else 0
    plan = plan_config(config, config.gpu)
    if config.json:
        print(as_json(plan))
        return 0
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 150))  # a file has no wrapped tables
    for table in (memory_table(plan), time_table(plan), communication_table(plan)):
        if table.row_count:
            console.print(table)
    for line in summary(plan, budget):
        console.print(line, highlight=False)
    return 0
