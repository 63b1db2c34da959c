"""Reads a trace of torch.profiler (Chrome trace format) as spans of device work.

On a GPU the spans are its kernels and copies. Without a GPU they are the operators of the CPU. The
span of an operator excludes the operators that it calls.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dtron.errors import UserError
from dtron.json_files import read_bytes

Category = Literal["matmul", "attention", "elementwise", "communication", "copy"]
Event = dict[str, Any]  # as in the trace
Interval = tuple[float, float]

# The first row that matches the name, ignoring case, gives the category of a kernel or operator.
# Triton's fused kernels stand before attention and matmul, because the name of a fusion contains
# the names of matmuls and attention. Attention stands before matmul, because some kernels of
# attention have CUTLASS in their names too.
KINDS: tuple[tuple[Category, str], ...] = (
    ("communication", r"nccl|gloo:|c10d"),
    ("copy", r"^mem(cpy|set)|^aten::copy_$"),
    ("elementwise", r"^triton_(?!tem_)"),
    ("attention", r"flash|sdpa|fmha|attention|cudnn_generated"),
    ("matmul", r"nvjet|gem[mv]|cutlass|cublas|xmma|_scaled_mm|^triton_tem_\w*mm"),
    ("matmul", r"^aten::(\w*mm|\w*mv|matmul|linear|dot|einsum)$"),
    ("elementwise", ""),
)


def classify(name: str) -> Category:
    """Return the category of a kernel or an operator by name."""
    return next(category for category, part in KINDS if re.search(part, name, re.IGNORECASE))


_LARGEST = 1 << 33  # bytes of a trace


class Span(NamedTuple):
    """One interval of device work, from ``start`` to ``end``, in microseconds."""

    name: str
    category: Category
    start: float
    end: float


def read(path: Path | str) -> list[Span]:
    """Read the spans of one step from a trace. The file may be compressed by gzip.

    Raises UserError if the file is missing, is no trace, or has no work in it.
    """
    remedy = "give a trace.json that train.py --profile wrote"
    data = read_bytes(Path(path), _LARGEST)
    malformed = (
        RecursionError,
        OSError,
        EOFError,
        zlib.error,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    )
    try:
        trace = json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
        spans = spans_of([event for event in trace["traceEvents"] if event.get("ph") == "X"])
    except (*malformed, RecursionError) as error:
        why = type(error).__name__
        raise UserError(f"{path}: is not a Chrome trace ({why}); {remedy}") from error
    if not spans:
        raise UserError(f"{path}: has no kernel and no operator; {remedy}")
    return spans


def spans_of(events: Sequence[Event]) -> list[Span]:
    """Return the step's kernels and copies if there are any, else the operators.

    The host runs ahead of the device: kernels that run while the host is in a step may belong
    to the previous step. A step's own kernels are the kernels that it *launched*. A kernel and its
    launch have the same correlation. If launches are unknown, all kernels count.
    """
    begin, end = step_range(events)
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not kernels:
        return list(operators(e for e in events if begin <= e["ts"] < end))
    launched_at = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e.get("cat", "").endswith(("_runtime", "_driver")) and "correlation" in e.get("args", {})
    }

    def in_step(kernel: Event) -> bool:
        correlation = kernel.get("args", {}).get("correlation")
        return begin <= launched_at.get(correlation, -math.inf) < end

    kernels = list(filter(in_step, kernels)) or kernels
    return [Span(e["name"], classify(e["name"]), e["ts"], e["ts"] + e["dur"]) for e in kernels]


def step_range(events: Sequence[Event]) -> Interval:
    """Return the host's interval of the step, from torch.profiler's last mark. Without a mark:
    all time."""
    marks = [
        e
        for e in events
        if e.get("cat") == "user_annotation" and e["name"].startswith("ProfilerStep#")
    ]
    last = max(marks, key=itemgetter("ts"), default=None)
    return (last["ts"], last["ts"] + last["dur"]) if last else (-math.inf, math.inf)


# Names of work on a CPU: operators, the work of gloo's threads, and compiled code. The own time of
# compiled code is the time of its fused loops. All other events (autograd's nodes, marks) only
# enclose work.
_WORK = re.compile(r"aten::|gloo:|\w*c10d|## Call CompiledFxGraph")


def operators(events: Iterable[Event]) -> Iterator[Span]:
    """Yield each CPU operator's own time: on a thread, time counts for the innermost open call."""
    threads: defaultdict[Any, list[tuple[float, bool, float, str]]] = defaultdict(list)
    for e in events:
        if e.get("cat") in ("cpu_op", "user_annotation") and e["ts"] < e["ts"] + e["dur"]:
            # At equal times, ends sort before begins, and an outer call begins before its inner.
            threads[e["pid"], e["tid"]] += [
                (e["ts"], True, -e["dur"], e["name"]),
                (e["ts"] + e["dur"], False, -e["dur"], e["name"]),
            ]
    for edges in threads.values():
        calls: list[str] = []
        since = 0.0
        for now, begins, _, name in sorted(edges):
            if calls and since < now and _WORK.match(calls[-1]):
                yield Span(calls[-1], classify(calls[-1]), since, now)
            if begins:
                calls.append(name)
            else:
                calls.pop()
            since = now
