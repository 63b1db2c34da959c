"""The first table of docs/performance.md: the newest line of each named case, beside other systems.

A name stands for flags of bench/train.py (results/named_cases.txt). bench/report.py prints the
table. A line counts if it was measured with these flags on an H200. Options that change the state
of the optimizer are other cases, and a line with more options is never the newest of a case. A case
without a line has no row.

Published figures are in results/published.json. They are of other machines and of other numbers of
tokens in a step, and the table says both. Needs torch, for the flags of bench/train.py."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from report import FOLDER, Case, Line, case_of, latest, number
from step_flags import USUAL, arguments, model_name

from dtron.distributed.mesh_shape import MeshShape

NAMED, PUBLISHED = FOLDER / "named_cases.txt", FOLDER / "published.json"
DEVICE = "NVIDIA H200"
COLUMNS = (
    "case",
    "tokens of a GPU in a step",
    "tokens/s per GPU",
    "TFLOP/s per GPU",
    "MFU",
    "peak GiB",
    "step ms",
    "best other system on the same kind of GPU",
    "published elsewhere",
    "date",
)


def read_named(path: Path = NAMED) -> dict[str, list[str]]:
    """Return the flags of each named case."""
    rows = (shlex.split(row, comments=True) for row in path.read_text().splitlines())
    return {name.removesuffix(":"): flags for name, *flags in filter(None, rows)}


def read_published() -> list[dict[str, Any]]:
    return json.loads(PUBLISHED.read_text())["runs"]


def line_of(flags: list[str]) -> Line:
    """Return the fields of a line that these flags choose."""
    o = arguments(flags)
    fixed = {"model": model_name(o), "mesh": str(MeshShape.parse(o.mesh)), "dtype": "bfloat16"}
    chosen = {name: x for name, x in vars(o).items() if x != USUAL.get(name)}
    return chosen | fixed | {"device": DEVICE}


def options_of(line: Line) -> tuple[Any, ...]:
    """Return the options that make another case of a line, and that its ``Case`` does not have."""
    more = ("cp_method", "attention_kernel") if "cp=" in line["mesh"] else ("attention_kernel",)
    usual = USUAL | {"attention_kernel": "auto", "cp_method": "ring"}
    return tuple(line.get(name) or usual[name] for name in (*USUAL, *more))


def newest(flags: list[str], lines: Iterable[Line]) -> Line | None:
    """Return the newest line of a case. Of several ways to run it on one date, the fastest counts.
    None if there is no line."""
    wanted = line_of(flags)
    schedule = wanted["schedule"] if "pp=" in wanted["mesh"] else None
    found = [
        x
        for x in lines
        if case_of(x) == case_of(wanted)
        and options_of(x) == options_of(wanted)
        and schedule in (None, x.get("pipeline.schedule"))
        and x.get("data_wait_ratio") is None
    ]
    return max(found, key=lambda x: (x["date"], x["tokens_per_s_per_gpu"]), default=None)


def row(line: Line, peers: Iterable[Line], published: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the cells of a case. Unknown values are blank."""
    case: Case = case_of(line)
    same = [x for x in peers if case_of(x) == case]
    best = max(same, key=lambda x: x["tokens_per_s_per_gpu"], default=None)
    beside = "" if best is None else f"{best['tokens_per_s_per_gpu']:,} ({best['system']})"

    def elsewhere(x: Mapping[str, Any]) -> str:
        tokens = f", {x['tokens_per_step']:,} tokens in a step" if "tokens_per_step" in x else ""
        return (
            f"{x['tokens_per_s_per_gpu']:,} ({x['tflops_per_gpu']} TFLOP/s): {x['source']}, "
            f"{x['gpus']} x {x['device']}{tokens}"
        )

    shape = MeshShape.parse(line["mesh"])
    tokens = case.rows * case.microbatches * case.seq_len * shape.data // shape.size
    schedule = line.get("pipeline.schedule")
    return [
        f"{case}, {schedule}" if schedule else str(case),
        f"{tokens:,}",
        f"**{line['tokens_per_s_per_gpu']:,}**",
        number(line, "tflops_per_gpu", ".0f"),
        number(line, "mfu", ".1%").replace("%", " %"),
        number(line, "peak_memory_gib", ".1f"),
        number(line, "step_ms", ",.1f"),
        beside,
        "; ".join(map(elsewhere, published)),
        line["date"],
    ]


def named_table(lines: list[Line], peers: list[Line]) -> str:
    """Return the table in Markdown."""
    published, lines = read_published(), latest(lines)
    rows = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for name, flags in read_named().items():
        line = newest(flags, lines)
        if line is not None:
            own = [x for x in published if name in x["cases"]]
            rows.append(f"| {' | '.join(row(line, peers, own))} |")
    return "\n".join(rows)
