"""From what the benchmarks printed to the table of docs/performance.md, so that no number is copied
by hand.

    python bench/train.py ... | tail -1 >> bench/results.jsonl
    python bench/report.py --write docs/performance.md      # puts the table between the page's two marks
    python bench/report.py --check docs/performance.md      # exit code 1 where the page says anything else

Of several lines for one case, measured in the same way, the latest date counts, then the last one
in the file. Other systems' rows are in peers.json and stand beside ours of the same case: the same
model, mesh, ZeRO stage, precision, sizes and device. Needs Python alone."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.renamed import current
from dtron.runtime.exit import run_cli

RESULTS, PEERS = (Path(__file__).parent / name for name in ("results.jsonl", "peers.json"))
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
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
    "system", "case", "tokens/s per GPU", "TFLOP/s per GPU", "MFU", "peak GiB", "host / step ms",
    "first step s", "to the best peer", "measured on",
)  # fmt: skip
Line = Mapping[str, Any]


class Case(NamedTuple):
    """What must be the same for two rows to be compared, in the order of the table."""

    model: str
    device: str
    gpus: int
    mesh: str
    zero: str  # empty where there is nothing to shard over: all stages are the same then
    recompute: str  # empty: nothing is
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
    shape, fp8, again = MeshShape.parse(line["mesh"]), line.get("fp8"), line.get("recompute")
    share = line.get("recompute_budget")
    precision = {"bfloat16": "bf16", "float32": "fp32"}.get(line["dtype"], line["dtype"])
    if fp8 not in (None, "none"):
        precision = f"fp8 {fp8}{' ends too' if line.get('fp8_first_last') else ''}"
        precision += ", gathered in FP8" if line.get("fp8_gather") else ""
    return Case(
        line["model"],
        line["device"],
        shape.size,
        "one GPU" if shape.size == 1 else str(shape),
        f"zero {line['zero']}" if shape.dp * shape.cp > 1 else "",
        ""
        if again in (None, "none")
        else f"recompute {again}{'' if share is None else f' {share:g}'}",
        precision,
        line.get("microbatches") or 1,
        line["rows"],
        line["seq_len"],
    )


def system_of(line: Line) -> str:
    """Who trained: a peer by its name, or dtron and what was chosen that does not change the
    result."""
    if "system" in line:
        return line["system"]
    attention = line.get("attention_kernel") or "auto"
    path = "" if attention == "auto" else f"attention {attention}"
    plain = "" if line.get("overlap", True) else "no overlap"
    graph = "CUDA graph" if line.get("cuda_graph") else ""
    how = "compiled" if line["compiled"] else "eager"
    method = f"cp by {line['cp_method']}" if line.get("cp_method") else ""
    copies = "copy engines" if line.get("copy_engines") else ""
    sums = f"sums in {line['reduce_dtype']}" if line.get("reduce_dtype") else ""
    data = (
        ""
        if line.get("data_wait_ratio") is None
        else f"reading data, {line['data_wait_ratio']:.3%} waiting"
    )
    parts = (
        "**dtron**",
        how,
        graph,
        line.get("pipeline.schedule"),
        path,
        plain,
        method,
        copies,
        sums,
        data,
    )
    return ", ".join(filter(None, parts))


def read(path: Path) -> list[Line]:
    """The lines of a file. Raises UserError for one that no benchmark printed."""
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
    """The line under today's names, whatever version printed it."""
    line = current(line) if isinstance(line, dict) else {}
    missing = [k for k in needed if line.get(k) is None]
    if missing:
        raise UserError(
            f"{where}: has no {', '.join(missing)}, which every row needs; measure it again"
        )
    return line


def latest(lines: Iterable[Line]) -> list[Line]:
    """One line for each case and way to run it."""
    return list(
        {(case_of(x), system_of(x)): x for x in sorted(lines, key=lambda x: x["date"])}.values()
    )


def table(ours: Iterable[Line], peers: Iterable[Line]) -> str:
    """Markdown: cases in order, in each the fastest first; peers where there is a row of ours to
    compare."""
    ours, peers = latest(ours), list(peers)
    cases = {case_of(x) for x in ours}
    best: dict[Case, float] = {}
    for x in peers:
        best[case_of(x)] = max(x["tokens_per_s_per_gpu"], best.get(case_of(x), 0))
    shown = [*ours, *(x for x in peers if case_of(x) in cases)]
    shown.sort(key=lambda x: (case_of(x), -x["tokens_per_s_per_gpu"]))
    head = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    return "\n".join([*head, *(f"| {' | '.join(cells(x, best.get(case_of(x))))} |" for x in shown)])


def cells(x: Line, best: float | None) -> list[str]:
    """A row; what is not known is left blank."""
    number = lambda name, form: "" if x.get(name) is None else format(x[name], form)
    times = [number("host_ms", ".1f"), number("step_ms", ".1f")]
    ratio = f"{x['tokens_per_s_per_gpu'] / best:.2f}x" if best and "system" not in x else ""
    return [
        system_of(x), str(case_of(x)), number("tokens_per_s_per_gpu", ",.0f"),
        number("tflops_per_gpu", ".0f"), number("mfu", ".1%").replace("%", " %"),
        number("peak_memory_gib", ".1f"),
        " / ".join(t or "-" for t in times) if any(times) else "", number("first_step_s", ".0f"), ratio,
        f"{x['device']}, torch {x['torch']}, {x['date']}",
    ]  # fmt: skip


def replaced(page: Path, new: str) -> tuple[str, str]:
    """The page as it is, and with this table between its marks."""
    try:
        old = page.read_text()
    except OSError as error:
        raise UserError(
            f"{page}: cannot be read ({error.strerror}); give a page that exists"
        ) from error
    head, begin, rest = old.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise UserError(
            f"{page}: has no place for the table; put {BEGIN} and {END} there, on their own lines"
        )
    return old, f"{head}{BEGIN}\n{new}\n{END}{tail}"


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(
        description="The table of docs/performance.md, from what was measured."
    )
    p.add_argument("files", nargs="*", type=Path, default=[RESULTS], help="what benchmarks printed")
    do = p.add_mutually_exclusive_group()
    do.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    do.add_argument(
        "--check", type=Path, metavar="PAGE", help="exit code 1 unless the page has this table"
    )
    o = p.parse_args(argv)
    new = table([line for file in o.files for line in read(file)], read_peers())
    if o.write:
        o.write.write_text(replaced(o.write, new)[1])
    elif o.check:
        old, want = replaced(o.check, new)
        if old != want:
            print(
                f"{o.check}: not what was measured; run bench/report.py --write {o.check}",
                file=sys.stderr,
            )
            return 1
    else:
        print(new)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
