"""Make the tables of two pages from the lines that benchmarks printed.

    python bench/train.py ... | tail -1 >> bench/results/results.jsonl
    python bench/report.py --write docs/performance.md     # the newest line of each named case
    python bench/report.py --write docs/measurements.md    # every measured case
    python bench/report.py --check docs/measurements.md    # exit code 1 if the page differs

A table is written between two marks in the page, and the name in the marks says which table it is.
The table of named cases is in named.py. The rest is about the table of every case.

No number is copied by hand. If a case was measured several times in the same way, the line with the
latest date counts; of one date, the last line in the file. The rows of other systems are in
results/peers.json. A row of another system is printed if dtron has a row of the same case: the same
model, mesh, ZeRO stage, precision, sizes and device. Needs dtron, and torch for the named cases."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.renamed import current
from dtron.runtime.exit import run_cli

FOLDER = Path(__file__).parent / "results"
RESULTS, PEERS = FOLDER / "results.jsonl", FOLDER / "peers.json"
NEEDED = (
    "model",
    "mesh",
    "rows",
    "seq_len",
    "dtype",
    "device",
    "torch",
    "date",
    "tokens_per_s_per_gpu",
)
COLUMNS = (
    "system",
    "case",
    "tokens/s per GPU",
    "TFLOP/s per GPU",
    "MFU",
    "peak GiB",
    "host / step ms",
    "first step s",
    "to the best peer",
    "measured on",
)
Line = Mapping[str, Any]


class Case(NamedTuple):
    """The case of a row, in the order of the table. Only rows of the same case are compared.

    ``zero``: empty if there is nothing to shard over, because then all ZeRO stages are the same.
    ``recompute``: empty if nothing is recomputed."""

    model: str
    device: str
    gpus: int
    mesh: str
    zero: str
    recompute: str
    precision: str
    microbatches: int
    rows: int
    seq_len: int

    def __str__(self) -> str:
        parts = f"{self.microbatches} x " if self.microbatches > 1 else ""
        sizes = f"{parts}{self.rows} x {self.seq_len}"
        named = (self.model, self.mesh, self.zero, self.precision, sizes, self.recompute)
        return ", ".join(filter(None, named))


def case_of(line: Line) -> Case:
    shape, fp8 = MeshShape.parse(line["mesh"]), line.get("fp8")
    policy, share = line.get("recompute") or "none", line.get("recompute_budget")
    budget = "" if share is None else f" {share:g}"
    precision = {"bfloat16": "bf16", "float32": "fp32"}.get(line["dtype"], line["dtype"])
    if fp8 not in (None, "none"):
        precision = f"fp8 {fp8}{' ends too' if line.get('fp8_first_last') else ''}"
        precision += ", gathered in FP8" if line.get("fp8_gather") else ""
    return Case(
        line["model"] + trained(line),
        line["device"],
        shape.size,
        "one GPU" if shape.size == 1 else str(shape),
        f"zero {line['zero']}" if shape.dp * shape.cp > 1 else "",
        "" if policy == "none" else f"recompute {policy}{budget}",
        precision,
        line.get("microbatches") or 1,
        line["rows"],
        line["seq_len"],
    )


def trained(line: Line) -> str:
    """Return what is trained of the model; empty if that is the whole model."""
    rank, base = line.get("lora_rank"), line.get("quantize_base")
    return (f" LoRA rank {rank}" if rank else "") + (f" on {base} weights" if base else "")


def system_of(line: Line) -> str:
    """Return a peer's name, or dtron with the options that do not change the result."""
    if "system" in line:
        return line["system"]
    attention = line.get("attention_kernel") or "auto"
    path = "" if attention == "auto" else f"attention {attention}"
    plain = "" if line.get("overlap", True) else "no overlap"
    graph = "CUDA graph" if line.get("cuda_graph") else ""
    how = "compiled" if line["compiled"] else "eager"
    method = f"cp by {line['cp_method']}" if line.get("cp_method") else ""
    copies = "copy engines" if line.get("copy_engines") else ""
    moments = f"{line['moments']} moments" if line.get("moments") else ""
    masters = f"{line['master_weights']} masters" if line.get("master_weights") else ""
    sums = f"sums in {line['reduce_dtype']}" if line.get("reduce_dtype") else ""
    wait = line.get("data_wait_ratio")
    data = "" if wait is None else f"reading data, {wait:.3%} waiting"
    parts = (
        "**dtron**",
        how,
        graph,
        line.get("pipeline.schedule"),
        path,
        plain,
        method,
        copies,
        line.get("optim"),
        moments,
        masters,
        "state on the host" if line.get("offload_state") else "",
        sums,
        data,
    )
    return ", ".join(filter(None, parts))


def read(path: Path) -> list[Line]:
    """Read the lines of a file. Raises UserError for a line that no benchmark printed."""
    remedy = "append the last line that bench/train.py prints"
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    found = []
    for number, row in enumerate(text.splitlines(), 1):
        try:
            line = json.loads(row)
        except ValueError as error:
            raise UserError(f"{path}:{number}: {row[:40]!r} is not JSON; {remedy}") from error
        found.append(checked(line, f"{path}:{number}", (*NEEDED, "zero", "compiled")))
    return found


def read_peers() -> list[Line]:
    found = json.loads(PEERS.read_text())["rows"]
    return [
        checked(row, f"{PEERS}: row {i}", (*NEEDED, "system")) for i, row in enumerate(found, 1)
    ]


def checked(line: Any, where: str, needed: Iterable[str]) -> Line:
    """Return the line under today's names, whichever version printed it. Raises UserError if a
    needed name is missing."""
    line = current(line) if isinstance(line, dict) else {}
    missing = [k for k in needed if line.get(k) is None]
    if missing:
        raise UserError(
            f"{where}: has no {', '.join(missing)}, which every row needs; measure it again"
        )
    return line


def latest(lines: Iterable[Line]) -> list[Line]:
    """Return the latest line of each case and way to run it."""
    by_date = sorted(lines, key=itemgetter("date"))
    return list({(case_of(x), system_of(x)): x for x in by_date}.values())


def table(ours: Iterable[Line], peers: Iterable[Line]) -> str:
    """Return the table in Markdown. Cases are in order, and within a case the fastest system is
    first. A peer's row is left out if dtron has no row of its case."""
    ours, peers = latest(ours), list(peers)
    cases = {case_of(x) for x in ours}
    best: dict[Case, float] = {}
    for x in peers:
        best[case_of(x)] = max(x["tokens_per_s_per_gpu"], best.get(case_of(x), 0))
    shown = [*ours, *(x for x in peers if case_of(x) in cases)]
    shown.sort(key=case_and_speed)
    head = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    return "\n".join([*head, *(f"| {' | '.join(cells(x, best.get(case_of(x))))} |" for x in shown)])


def case_and_speed(line: Line) -> tuple[Case, float]:
    """Sort by case, and within a case the fastest first."""
    return case_of(line), -line["tokens_per_s_per_gpu"]


def number(x: Line, name: str, form: str) -> str:
    """Return a number of a line as text; blank if it is not known."""
    return "" if x.get(name) is None else format(x[name], form)


def cells(x: Line, best: float | None) -> list[str]:
    """Return the cells of a row. Unknown values are blank."""

    times = [number(x, "host_ms", ".1f"), number(x, "step_ms", ".1f")]
    ratio = f"{x['tokens_per_s_per_gpu'] / best:.2f}x" if best and "system" not in x else ""
    return [
        system_of(x),
        str(case_of(x)),
        number(x, "tokens_per_s_per_gpu", ",.0f"),
        number(x, "tflops_per_gpu", ".0f"),
        number(x, "mfu", ".1%").replace("%", " %"),
        number(x, "peak_memory_gib", ".1f"),
        " / ".join(t or "-" for t in times) if any(times) else "",
        number(x, "first_step_s", ".0f"),
        ratio,
        f"{x['device']}, torch {x['torch']}, {x['date']}",
    ]


def replaced(page: Path, new: str, name: str = "table") -> tuple[str, str]:
    """Return the page as it is, and the page with this table between the marks of its name. Raises
    UserError if the page cannot be read or lacks the marks."""
    first, last = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    try:
        old = page.read_text()
    except OSError as error:
        raise UserError(
            f"{page}: cannot be read ({error.strerror}); give a page that exists"
        ) from error
    head, begin, rest = old.partition(first)
    _, end, tail = rest.partition(last)
    if not (begin and end):
        raise UserError(
            f"{page}: has no place for the table; put {first} and {last} there, on their own lines"
        )
    return old, f"{head}{first}\n{new}\n{last}{tail}"


def with_table(page: Path, files: Iterable[Path]) -> tuple[str, str]:
    """Return the page as it is, and with its table made anew. Raises UserError as ``replaced``."""
    name = _name_of(page)
    return replaced(page, _made(name, [x for file in files for x in read(file)]), name)


def _name_of(page: Path) -> str:
    """Return the name of the table that a page has a place for."""
    named = page.is_file() and "<!-- named: begin -->" in page.read_text()
    return "named" if named else "table"


def _made(name: str, lines: list[Line]) -> str:
    if name == "table":
        return table(lines, read_peers())
    from named import named_table  # which needs torch

    return named_table(lines, read_peers())


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(description="Make the tables of measured lines.")
    p.add_argument("files", nargs="*", type=Path, default=[RESULTS], help="lines of benchmarks")
    do = p.add_mutually_exclusive_group()
    do.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    do.add_argument(
        "--check", type=Path, metavar="PAGE", help="exit code 1 unless the page has this table"
    )
    o = p.parse_args(argv)
    if o.write:
        o.write.write_text(with_table(o.write, o.files)[1])
    elif o.check:
        old, want = with_table(o.check, o.files)
        if old != want:
            print(
                f"{o.check}: not what was measured; run bench/report.py --write {o.check}",
                file=sys.stderr,
            )
            return 1
    else:
        print(_made("table", [line for file in o.files for line in read(file)]))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
