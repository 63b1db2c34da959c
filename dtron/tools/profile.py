"""Time breakdown of a training step: ``train.py --profile``, and ``python -m dtron.profile
trace.json``.

A step is a set of intervals of device work. Intervals may overlap, above all a collective with a
matmul on another stream. So times are not added up. Each moment of the step counts once, for the
first of these categories that is busy:

    matmul, attention, elementwise    compute; elementwise is all compute but matmul and attention
    communication                     only *exposed* collectives: no compute runs meanwhile
    copy                              memory copied or set, while nothing else runs
    idle                              nothing runs

These sum to the step's span, from its first interval to its last. Communication *hidden* behind
compute costs no time. It is not in the sum and is reported separately. (Kernels of one stream run
one after the other, so overlapping kernels are on different streams.)

Intervals are the kernels and copies of a GPU. Without one they are the operators of the CPU, each
without the operators that it calls; idle is then Python's and the dispatcher's time.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import re
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dtron.errors import UserError
from dtron.runtime.config import RunConfig

Category = Literal["matmul", "attention", "elementwise", "communication", "copy"]
ORDER: tuple[Category, ...] = ("matmul", "attention", "elementwise", "communication", "copy")
Interval = tuple[float, float]

# The first row that matches the name, ignoring case, gives the category of a kernel or operator.
KINDS: tuple[tuple[Category, str], ...] = (
    ("communication", r"nccl|gloo:|c10d"),
    ("copy", r"^mem(cpy|set)|^aten::copy_$"),
    (
        "elementwise",
        r"^triton_(?!tem_)",
    ),  # fusion names contain names of matmuls and attention
    (
        "attention",
        r"flash|sdpa|fmha|attention|cudnn_generated",
    ),  # some are CUTLASS too, hence before it
    ("matmul", r"nvjet|gem[mv]|cutlass|cublas|xmma|_scaled_mm|^triton_tem_\w*mm"),
    ("matmul", r"^aten::(\w*mm|\w*mv|matmul|linear|dot|einsum)$"),
    ("elementwise", ""),
)


def classify(name: str) -> Category:
    """Return the category of a kernel or an operator by name."""
    return next(category for category, part in KINDS if re.search(part, name, re.IGNORECASE))


class Span(NamedTuple):
    """One interval of device work, from ``start`` to ``end``, in microseconds."""

    name: str
    category: Category
    start: float
    end: float


@dataclass(frozen=True)
class Breakdown:
    """Microseconds of a step. All but ``hidden`` sum to ``span``."""

    span: float
    matmul: float
    attention: float
    elementwise: float
    communication: float  # exposed
    copy: float
    idle: float
    hidden: float


def breakdown(spans: Sequence[Span]) -> Breakdown:
    """Break down the time from the first span to the last. Needs at least one span."""
    of = {c: union((s.start, s.end) for s in spans if s.category == c) for c in ORDER}
    busy: list[Interval] = []
    counted = {}
    for category in ORDER:
        counted[category] = length(subtract(of[category], busy))
        busy = union([*busy, *of[category]])
    whole = [(busy[0][0], busy[-1][1])]
    return Breakdown(
        span=length(whole),
        idle=length(subtract(whole, busy)),
        hidden=length(of["communication"]) - counted["communication"],
        **counted,
    )


# ---- intervals; lists of intervals are sorted and disjoint unless stated otherwise


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Union of intervals. The input may be unsorted and may overlap."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def subtract(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """Return the parts of ``a`` outside ``b``."""
    left, first = [], 0
    for start, end in a:
        while first < len(b) and b[first][1] <= start:  # over before this one and all that follow
            first += 1
        i = first
        while i < len(b) and b[i][0] < end:
            if start < b[i][0]:
                left.append((start, b[i][0]))
            start = b[i][1]
            i += 1
        if start < end:
            left.append((start, end))
    return left


def length(intervals: Iterable[Interval]) -> float:
    return math.fsum(end - start for start, end in intervals)


# ---- a Chrome trace


def read(path: Path | str) -> list[Span]:
    """The spans of one step from a trace that torch.profiler wrote, packed by gzip or not.

    Raises UserError for a file that is missing, no trace, or a trace without any work in it.
    """
    remedy = "give a trace.json that train.py --profile wrote"
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    try:
        trace = json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
        spans = spans_of([event for event in trace["traceEvents"] if event.get("ph") == "X"])
    except (
        OSError,
        EOFError,
        zlib.error,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        raise UserError(
            f"{path}: is not a Chrome trace ({type(error).__name__}); {remedy}"
        ) from error
    if not spans:
        raise UserError(f"{path}: has no kernel and no operator; {remedy}")
    return spans


def spans_of(events: Sequence[dict[str, Any]]) -> list[Span]:
    """Return the step's kernels and copies if there are any, else the operators.

    The host runs ahead of the device: kernels that run while the host is in a step may belong
    to the previous step. A step's own kernels are the kernels that it *launched*; a kernel and its
    launch have the same correlation.
    """
    begin, end = step_range(events)
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not kernels:
        return list(operators(e for e in events if begin <= e["ts"] < end))
    launched = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e.get("cat", "").endswith(("_runtime", "_driver")) and "correlation" in e.get("args", {})
    }
    when = lambda e: launched.get(e.get("args", {}).get("correlation"), -math.inf)
    kernels = [
        e for e in kernels if begin <= when(e) < end
    ] or kernels  # all, if launches are unknown
    return [Span(e["name"], classify(e["name"]), e["ts"], e["ts"] + e["dur"]) for e in kernels]


def step_range(events: Sequence[dict[str, Any]]) -> Interval:
    """Return the host's interval of the step, from torch.profiler's last mark. Without a mark:
    all time."""
    marks = [
        e
        for e in events
        if e.get("cat") == "user_annotation" and e["name"].startswith("ProfilerStep#")
    ]
    last = max(marks, key=lambda e: e["ts"], default=None)
    return (last["ts"], last["ts"] + last["dur"]) if last else (-math.inf, math.inf)


# Work on a CPU: operators, what gloo's threads do, and compiled code (less the operators that it
# calls: its fused loops). The rest, autograd's nodes and marks, is only around them.
_WORK = re.compile(r"aten::|gloo:|\w*c10d|## Call CompiledFxGraph")


def operators(events: Iterable[dict[str, Any]]) -> Iterator[Span]:
    """Yield each CPU operator's own time: on a thread, time counts for the innermost open call."""
    threads = defaultdict(list)
    for e in events:
        if e.get("cat") in ("cpu_op", "user_annotation") and e["ts"] < e["ts"] + e["dur"]:
            # Where two share a moment the one ends before the other begins, and the outer begins
            # first.
            threads[e["pid"], e["tid"]] += [
                (e["ts"], True, -e["dur"], e["name"]),
                (e["ts"] + e["dur"], False, -e["dur"], e["name"]),
            ]
    for edges in threads.values():
        calls, since = [], 0.0
        for now, begins, _, name in sorted(edges):
            if calls and since < now and _WORK.match(calls[-1]):
                yield Span(calls[-1], classify(calls[-1]), since, now)
            if begins:
                calls.append(name)
            else:
                calls.pop()
            since = now


# ---- output


def rows(b: Breakdown) -> list[tuple[str, str, str]]:
    """The lines of the breakdown: what, milliseconds, share of the span."""
    parts = [
        ("matmul", b.matmul), ("attention", b.attention), ("elementwise", b.elementwise),
        ("communication, exposed", b.communication), ("memory copies", b.copy), ("idle", b.idle),
        ("the step", b.span), ("communication, hidden", b.hidden),
    ]  # fmt: skip
    return [(name, f"{us / 1e3:.2f}", f"{us / b.span:.1%}") for name, us in parts]


def top(spans: Sequence[Span], n: int) -> list[str]:
    """The ``n`` names with the most time in all, a line each."""
    found = defaultdict(list)
    for s in spans:
        found[s.name].append(s.end - s.start)
    most = sorted(found.items(), key=lambda item: -sum(item[1]))[:n]
    return [
        f"{sum(us) / 1e3:>9.2f} ms {len(us):>6} x  {classify(k):<13}  {k[:140]}" for k, us in most
    ]


def show(spans: Sequence[Span]) -> None:
    """Print the breakdown as a table."""
    from rich.console import Console  # the benchmarks do without
    from rich.table import Column, Table

    table = Table("one step", Column("ms", justify="right"), Column("share", justify="right"))
    for line in rows(breakdown(spans)):
        table.add_row(*line, end_section=line[0] in ("idle", "the step"))
    Console(highlight=False).print(table)


RECORDED_STEP = 5


class Recorder:
    """Records the ``step``-th step (0: none) to a file. Each process writes its own file. The
    first process prints the breakdown."""

    def __init__(
        self, path: Path, step: int, device: str, show: Callable[[Sequence[Span]], None] = show
    ) -> None:
        self._rank, name = int(os.environ.get("RANK", 0)), path.name
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            stem, dot, ending = name.partition(".")
            name = f"{stem}-rank{self._rank}{dot}{ending}"
        self._path, self._target, self._step, self._show = path.with_name(name), step, 0, show
        self._gpu = device.startswith("cuda")

    @classmethod
    def of_run(cls, config: RunConfig, run_dir: Path, done: int, device: str) -> Recorder:
        """A recorder of the fifth step of this process, or of the last one. Steps before it compile
        and allocate.

        ``done``: steps that an earlier process has trained."""
        step = min(RECORDED_STEP, config.steps - done) if config.profile else 0
        return cls(run_dir / "trace.json", step, device)

    def begin(self) -> None:
        """Mark the begin of a step."""
        from torch.profiler import ProfilerActivity, profile, record_function

        self._step += 1
        if self._target and self._step == max(self._target - 1, 1):
            # Starting the profiler takes so long that the device runs dry: a step early, where
            # there is one.
            gpu = [ProfilerActivity.CUDA] if self._gpu else []
            self._profiler = profile(activities=[ProfilerActivity.CPU, *gpu])
            with warnings.catch_warnings(action="ignore"):  # of more cycles than one
                self._profiler.prepare_trace()
        if self._step == self._target:
            self._profiler.start_trace()
            self._mark = record_function(f"ProfilerStep#{self._step}")
            self._mark.__enter__()

    def end(self) -> bool:
        """The host has launched the step. Whether it was the one to record: the device is then
        idle."""
        if self._step != self._target:
            return False
        self._mark.__exit__(None, None, None)
        self._profiler.stop_trace()  # waits for the device
        self._profiler.export_chrome_trace(str(self._path))
        if self._rank == 0:
            self._show(read(self._path))
        return True


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "dtron.profile", description="Where the time of a traced step goes."
    )
    parser.add_argument("trace", help="a Chrome trace that train.py --profile wrote")
    parser.add_argument(
        "--top", type=int, default=0, metavar="N", help="also the N kernels with most time"
    )
    o = parser.parse_args(argv)
    spans = read(o.trace)
    show(spans)
    for line in top(spans, o.top):
        print(line)
    return 0
