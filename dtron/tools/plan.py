"""Plans a step on any mesh, without a GPU: memory, time and messages.

    dtron plan --model llama3-8b --mesh dp=8 --zero 3 --batch 64 --micro-batch 1
    dtron plan --model llama3-70b --mesh dp=32,tp=8,pp=4 --batch 1024 --token-budget 15T
    dtron plan search --model llama3-8b --gpus 64 --batch-tokens 4M --data.seq-len 8192

The search tries all meshes, ZeRO stages, schedules, microbatches and activation policies
(plan_search.py). A plan takes all flags of train.py. The program of every pipeline rank runs on
tensors without numbers (planner/plan_step.py), so it is a reading of the code that trains, and
takes seconds. Times come from the rates of a GPU, measured once (planner/gpu_rates.py). ``--gpu``
is a name or a file.

A plan assumes what train.py chooses on GPUs: compiled units, a recorded step, and bfloat16.
"""

from __future__ import annotations

import json
import logging
import shlex
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.planner.gpu_rates import load_gpu
from dtron.planner.plan_step import plan_rank, plan_ranks
from dtron.planner.rank_report import as_json as rank_json
from dtron.planner.rank_report import check_rank, kernel_table, message_table, place_lines
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
from dtron.tools.console import wide_console
from dtron.tools.html_page import check_output, write_page
from dtron.tools.plan_page import plan_page
from dtron.tools.plan_search import LARGEST, Choice, Search, frontier
from dtron.tools.search_page import search_page
from dtron.training.batch_ramp import UNITS as RAMP_UNITS
from dtron.training.config import RunPlan

UNITS = RAMP_UNITS | {"T": 10**12}


@dataclass(frozen=True)
class PlanConfig(RunConfig):
    """Plan memory, time and messages of a training step on any mesh. No GPU is needed."""

    gpu: str = "h200"
    """rates of a GPU: a name, as h200, or a file as planner/gpu/h200.json"""
    token_budget: str = ""
    """tokens of the whole run, as 15T; prints days and GPU-hours"""
    json: bool = False
    """print one line of JSON in place of the tables"""
    output: str | None = None
    """file for a page of HTML with the plan's pictures; -o for short"""
    trace: int | None = None
    """number of a rank: print what this rank launches and sends, in place of the plan; with
    --json in order"""


def plan_config(config: RunConfig, gpu_name: str = "h200") -> StepPlan:
    """Plan a step. Raises UserError for an invalid config."""
    gpu, shape = load_gpu(gpu_name), MeshShape.parse(config.mesh)
    plan = compiled_plan(config, shape)
    ranks = plan_ranks(config, plan)
    copies = config.zero == 3 and config.copy_engines == "auto"
    copies &= any(link_of(shape, axis, gpu) == "nvlink" for axis in zero_axes(tuple(shape.atoms)))
    times = time_step(ranks, shape, gpu, copies)
    tokens = plan.count * plan.rows * config.data.seq_len
    return StepPlan(config, shape, gpu, ranks, times, tokens, copies)


def compiled_plan(config: RunConfig, shape: MeshShape) -> RunPlan:
    """Return the config resolved for GPUs. Raises UserError for an invalid config."""
    plan, _ = resolve(config, shape, "cuda")
    if not plan.compile:
        raise UserError("--compile off: a plan is of a compiled step; drop --compile")
    return plan


def quiet() -> None:
    """Leave out the warnings of torch, which are about a CPU that computes."""
    logging.getLogger("torch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


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
            "watts_per_gpu": round(plan.watts / plan.shape.size),
            "joules_per_token": round(plan.watts * plan.seconds / plan.tokens, 6),
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


def token_count(text: str, flag: str) -> float:
    """Read a number of tokens such as 15T. Raises UserError for any other text."""
    number, unit = (text[:-1], UNITS[text[-1]]) if text[-1:] in UNITS else (text, 1)
    try:
        count = float(number) * unit
    except ValueError:
        count = 0.0
    if not 0 < count < 1e18:
        raise UserError(f"{flag} {text}: a number of tokens, as 15T, 300B or 2e9")
    return count


@dataclass(frozen=True)
class SearchConfig(RunConfig):
    """Search all meshes of a number of GPUs for the fastest step that fits. No GPU is needed."""

    gpu: str = "h200"
    """rates of a GPU: a name, as h200, or a file as planner/gpu/h200.json"""
    gpus: int = 8
    """number of GPUs"""
    batch_tokens: str = "1M"
    """tokens of a step, as 4M"""
    top: int = 10
    """number of results to print"""
    output: str | None = None
    """file for a page of HTML with all choices; -o for short"""


def search(argv: Sequence[str]) -> int:
    from dtron.runtime.cli import parse

    config = parse(argv, SearchConfig(), prog="dtron plan search")
    gpu, batch = load_gpu(config.gpu), tokens_of_step(config)
    if config.output is not None:
        check_output("--output", config.output)
    quiet()
    found = Search(config, gpu, config.gpus, batch)
    choices = found.run()
    console = wide_console()
    best = frontier(choices)
    console.print(choices_table(choices, best, config.top))
    for mesh, reason in found.refused.items():
        console.print(f"{mesh}: {reason}", highlight=False)
    console.print(
        f"{len(choices)} choices fit, {found.too_large} need more memory", highlight=False
    )
    command = shlex.join(["dtron", "plan", *without_search(argv)])
    for choice in choices[:3]:
        console.print(f"{command} {choice.flags}", highlight=False, soft_wrap=True)
    if config.output is not None:
        text = search_page(found, choices, argv, command, config.gpu)
        write_page("--output", config.output, text)
        console.print(f"drawn to {config.output}", highlight=False, soft_wrap=True)
    return 0


def without_search(argv: Sequence[str]) -> list[str]:
    """Return the arguments of a search that a plan takes, too."""
    own, found = ("--gpus", "--batch-tokens", "--top", "--output", "-o"), list[str]()
    left = iter(argv)
    for x in left:
        if x.partition("=")[0] not in own:
            found.append(x)
        elif "=" not in x:
            next(left, None)  # its value
    return found


def choices_table(choices: Sequence[Choice], best: Sequence[Choice], top: int) -> Table:
    """Return a table of the fastest choices. A star marks a choice that no other one beats in both
    memory and speed."""
    out = Table(title="the fastest choices that fit")
    columns = (
        "",
        "mesh",
        "zero",
        "schedule",
        "microbatches",
        "recompute",
        "GiB",
        "tokens/s",
        "MFU",
    )
    for name in columns:
        out.add_column(name, justify="right" if name in columns[6:] else "left", no_wrap=True)
    for x in choices[:top]:
        c = x.config
        schedule = c.pipeline.schedule if x.shape.pp > 1 else ""
        sizes = f"{x.microbatches} x {c.micro_batch}"
        star = "*" if x in best else ""
        speed, mfu = f"{x.tokens_per_second:,.0f}", f"{100 * x.mfu:.1f} %"
        cells = (star, str(x.shape), str(c.zero), schedule, sizes, c.recompute)
        out.add_row(*cells, f"{x.gib:.1f}", speed, mfu)
    return out


def tokens_of_step(config: SearchConfig) -> int:
    """Return the sequences of a step. Raises UserError if they are none, and for a flag that the
    search would overwrite."""
    usual = RunConfig()
    for name in ("mesh", "zero", "batch", "micro_batch", "recompute", "pipeline"):
        if getattr(config, name) != getattr(usual, name):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"dtron plan search {flag}: the search chooses it; drop {flag}")
    if not 1 <= config.gpus <= LARGEST:
        raise UserError(f"--gpus {config.gpus}: from 1 to {LARGEST}; change it")
    batch = int(token_count(config.batch_tokens, "--batch-tokens") // config.data.seq_len)
    if batch < 1:
        raise UserError(
            f"--batch-tokens {config.batch_tokens}: fewer than the {config.data.seq_len} tokens of "
            "one sequence; use more, or a smaller --data.seq-len"
        )
    return batch


def main(argv: Sequence[str]) -> int:
    from dtron.runtime.cli import parse

    if list(argv[:1]) == ["search"]:
        return search(argv[1:])
    config = parse(argv, PlanConfig(), prog="dtron plan")
    if config.output is not None:
        check_output("--output", config.output)
    if config.trace is not None:
        return trace(config)
    budget = token_count(config.token_budget, "--token-budget") if config.token_budget else 0
    quiet()
    plan = plan_config(config, config.gpu)
    if config.output is not None:
        write_page("--output", config.output, plan_page(plan, argv, config.gpu, budget))
    if config.json:
        print(as_json(plan))
        return 0
    console = wide_console()
    for table in (memory_table(plan), time_table(plan), communication_table(plan)):
        if table.row_count:
            console.print(table)
    for line in summary(plan, budget):
        console.print(line, highlight=False)
    if config.output is not None:
        console.print(f"drawn to {config.output}", highlight=False, soft_wrap=True)
    return 0


def trace(config: PlanConfig) -> int:
    """Print what one rank launches and sends."""
    assert config.trace is not None
    if config.output is not None:
        raise UserError("--trace --output: the page is of a plan; drop one of them")
    rank, gpu, shape = config.trace, load_gpu(config.gpu), MeshShape.parse(config.mesh)
    check_rank(rank, shape)
    quiet()
    ran = plan_rank(config, compiled_plan(config, shape), rank)
    if config.json:
        print(rank_json(ran, rank, shape, gpu))
        return 0
    console = wide_console()
    for line in place_lines(rank, shape, gpu):
        console.print(line, highlight=False)
    for table in (kernel_table(ran, gpu), message_table(ran, shape, gpu)):
        if table.row_count:
            console.print(table)
    return 0
