"""Compare plans with published runs of other systems: a check of scale.

    python bench/published.py                           # a table of markdown
    python bench/published.py --write docs/planning.md  # into the page's table

A published figure is another program's, on its own mesh. The plan is dtron's, on a mesh that fits,
with the rates of an H100 that were not measured (planner/gpu/h100.json). Needs no GPU."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from named import read_published
from report import replaced

from dtron.model.flops import flops_per_token
from dtron.planner.report import StepPlan
from dtron.runtime.cli import parse
from dtron.runtime.exit import Parser, run_cli
from dtron.tools.plan import plan_config, quiet

FP8 = "--fp8 tensorwise --fp8-first-last"


EIGHT_B = "--model llama3.1-8b --mesh dp=8 --zero 3 --batch 128 --micro-batch 1 --data.seq-len 8192"
SEVENTY_B = (
    "--model llama3.1-70b --mesh dp=2,cp=2,tp=4,pp=4 --zero 1 --batch 64 --micro-batch 1"
    " --data.seq-len 8192 --recompute selective"
)
LARGEST = (
    "--model llama3.1-405b --mesh dp=8,tp=8,pp=16 --zero 1 --batch 256 --micro-batch 1"
    " --data.seq-len 8192 --recompute full"
)
QWEN = (
    "--model qwen3-30b-a3b --mesh dp=8,ep=8 --zero 3 --batch 256 --micro-batch 1"
    " --data.seq-len 4096 --recompute full"
)
V3 = (
    "--model deepseek-v3 --mesh dp=64,tp=2,pp=8,ep=64 --batch 1024 --micro-batch 1"
    " --data.seq-len 4096 --recompute full --fp8 tensorwise"
)
FLAGS = {
    "Llama-3.1-8B bf16": EIGHT_B,
    "Llama-3.1-8B FP8": f"{EIGHT_B} {FP8}",
    "Llama-3.1-70B bf16": SEVENTY_B,
    "Llama-3.1-70B FP8": f"{SEVENTY_B} {FP8}",
    "Llama-3.1-405B FP8": f"{LARGEST} {FP8}",
    "Qwen3-30B-A3B bf16": QWEN,
    "DeepSeek-V3 FP8": V3,
}
"""The flags of train.py for the plan beside a published run, by the name of the run."""


def row(run: Mapping[str, Any], plan: StepPlan) -> str:
    each = flops_per_token(plan.config.model, plan.config.data.seq_len) / 1e12
    fits = "" if plan.fits else ", does not fit"
    return (
        f"| {run['name']}, {run['gpus']} x {run['device']} | {run['tokens_per_s_per_gpu']:,.0f} | "
        f"{run['tokens_per_s_per_gpu'] * each:,.0f} | {run['source']} | "
        f"{plan.tokens_per_second:,.0f} | {plan.tflops:,.0f} | {plan.gib:.0f} GiB{fits} | "
        f"`{plan.shape}` |"
    )


def main(argv: list[str]) -> int:
    p = Parser(description="Compare plans with published runs.")
    p.add_argument("--only", default="", help="runs whose names have this text")
    p.add_argument("--write", type=Path, help="write the table into this page")
    o = p.parse_args(argv)
    if o.write:
        replaced(o.write, "", "published")  # a page without a place is refused before the work
    quiet()
    rows = [
        "| run | tokens/s per GPU, published | TFLOP/s | source | dtron's plan | TFLOP/s | memory "
        "| mesh of the plan |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in read_published():
        if run["name"] in FLAGS and o.only in run["name"]:
            rows.append(row(run, plan_config(parse(FLAGS[run["name"]].split()), "h100")))
            print(rows[-1], file=sys.stderr)
    text = "\n".join(rows)
    if o.write:
        o.write.write_text(replaced(o.write, text, "published")[1])
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
