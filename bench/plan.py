"""Compare plans with measured steps: predicted and measured memory and time of each case.

    python bench/plan.py --gpu h200 --since 2026-11-30                # a table of markdown
    python bench/plan.py --write docs/planning.md                     # into the page's table

The cases are the lines of results/results.jsonl. torch counts no memory that GPUs share, so the
copies of weights that copy engines gather are taken from the plan of such a case. Needs torch, and
no GPU."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from report import RESULTS, case_of, latest, read, replaced
from step_flags import arguments, run_config

from dtron.planner.report import GIB, StepPlan
from dtron.runtime.exit import Parser, run_cli
from dtron.tools.plan import plan_config, quiet


@dataclass(frozen=True)
class Comparison:
    """A plan and a measurement of one case. Memory in GiB, times in milliseconds."""

    case: str
    plan: StepPlan
    memory: float
    measured_memory: float
    measured_ms: float

    @property
    def memory_error(self) -> float:
        return self.memory / self.measured_memory - 1

    @property
    def time_error(self) -> float:
        return 1e3 * self.plan.seconds / self.measured_ms - 1

    @property
    def measured_speed(self) -> float:
        """Tokens per second on one GPU."""
        return self.plan.tokens / self.measured_ms * 1e3 / self.plan.shape.size


def order(comparisons: list[Comparison]) -> str:
    """Return a line: how many pairs of cases on several GPUs are planned in the measured order.
    Speeds within 3 percent of each other count as equal."""
    several = [x for x in comparisons if x.plan.shape.size > 1]
    pairs = [
        (a, b)
        for a, b in combinations(several, 2)
        if abs(a.measured_speed / b.measured_speed - 1) > 0.03
    ]
    right = sum(
        (a.plan.tokens_per_second > b.plan.tokens_per_second)
        == (a.measured_speed > b.measured_speed)
        for a, b in pairs
    )
    return (
        f"Order: of {len(pairs)} pairs of cases on several GPUs whose speeds differ by more than\n"
        f"3 %, {right} are planned in the measured order."
    )


def flags(line: Mapping[str, Any]) -> Iterator[str]:
    """Return the arguments of bench/train.py that measured a line."""
    model, _, layers = line["model"].partition(" of ")
    yield from ("--model", model, "--mesh", line["mesh"], "--zero", str(line["zero"]))
    yield from ("--rows", str(line["rows"]), "--microbatches", str(line["microbatches"]))
    yield from ("--seq-len", str(line["seq_len"]), "--recompute", line["recompute"])
    if layers:
        yield from ("--layers", layers.split()[0])
    names = {
        "recompute_budget": "--recompute-budget",
        "fp8": "--fp8",
        "cp_method": "--cp-method",
        "pipeline.schedule": "--schedule",
        "moments": "--moments",
        "master_weights": "--master-weights",
        "optim": "--optim",
        "lora_rank": "--lora-rank",
        "quantize_base": "--quantize-base",
        "attention_kernel": "--attention-kernel",
    }
    for name, flag in names.items():
        if line.get(name) is not None:
            yield from (flag, str(line[name]))
    for name in ("fp8_first_last", "fp8_gather", "offload_state"):
        if line.get(name):
            yield "--" + name.replace("_", "-")
    if not line.get("copy_engines"):
        yield "--no-copy-engines"


def compare(line: Mapping[str, Any], gpu: str) -> Comparison:
    config = run_config(arguments([*flags(line)]))
    plan = plan_config(replace(config, data=replace(config.data, document_mask=False)), gpu)
    shared = [r.state["copies"] if plan.copy_engines else 0 for r in plan.ranks]
    pairs = zip(plan.ranks, shared, strict=True)
    memory = max(r.largest - n for r, n in pairs) / GIB + plan.gpu.overhead_gib
    name = str(case_of(line))
    extra = [str(line[x]) for x in ("moments", "master_weights", "optim") if line.get(x)]
    extra += [line["pipeline.schedule"]] if "pipeline.schedule" in line else []
    return Comparison(
        ", ".join([name, *extra]), plan, memory, line["peak_memory_gib"], line["step_ms"]
    )


def wanted(line: Mapping[str, Any], device: str, since: str) -> bool:
    usual = line["dtype"] == "bfloat16" and line.get("overlap", True) and line["compiled"]
    return usual and device in line["device"] and line["date"] >= since


def table(comparisons: list[Comparison]) -> str:
    """Return the table, and a line with the errors."""
    rows = [
        "| case | memory, planned | measured | error | step, planned | measured | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for x in comparisons:
        rows.append(
            f"| {x.case} | {x.memory:.1f} GiB | {x.measured_memory:.1f} | {x.memory_error:+.1%} | "
            f"{1e3 * x.plan.seconds:.1f} ms | {x.measured_ms:.1f} | {x.time_error:+.1%} |"
        )
    lines = []
    for name in ("memory", "time"):
        errors = [abs(getattr(x, f"{name}_error")) for x in comparisons]
        figures = statistics.mean(errors), statistics.median(errors), max(errors)
        lines.append(
            "{}: mean error {:.1%}, median {:.1%}, worst {:.1%}.".format(name.title(), *figures)
        )
    return "\n".join([*rows, "", *lines, order(comparisons)])


def main(argv: list[str]) -> int:
    p = Parser(description="Compare plans with measured steps.")
    p.add_argument("--gpu", default="h200", help="name or file of rates (h200)")
    p.add_argument("--device", default="H200", help="part of the name of the measured GPU (H200)")
    p.add_argument("--since", default="2026-11-30", help="first date of a measurement")
    p.add_argument("--only", default="", help="cases whose names have this text")
    p.add_argument("--write", type=Path, help="write the table into this page")
    o = p.parse_args(argv)
    if o.write:
        replaced(o.write, "", "plans")  # a page without a place is refused before the work
    lines = sorted(latest(read(RESULTS)), key=case_of)
    quiet()
    comparisons = []
    for line in lines:
        if wanted(line, o.device, o.since) and o.only in str(case_of(line)):
            comparisons.append(compare(line, o.gpu))
            x = comparisons[-1]
            print(f"{x.memory_error:+.1%} {x.time_error:+.1%} {x.case}", file=sys.stderr)
    text = table(comparisons)
    if o.write:
        o.write.write_text(replaced(o.write, text, "plans")[1])
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
