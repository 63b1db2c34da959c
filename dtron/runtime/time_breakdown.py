"""Time breakdown of a training step by category.

A step is a set of spans of device work (trace.py). Spans may overlap, above all a collective with a
matmul on another stream. So times are not added up. Each moment of the step counts once, for the
first of these categories that is busy:

    matmul, attention, elementwise    compute; elementwise is all compute but matmul and attention
    communication                     only *exposed* collectives: no compute runs meanwhile
    copy                              memory copied or set, while nothing else runs
    idle                              nothing runs

These sum to the step's span, from the start of its first interval to the end of its last.
Communication *hidden* behind compute costs no time. It is not in the sum and is reported
separately. (Kernels of one stream run one after the other, so overlapping kernels are on different
streams.)

Without a GPU, ``idle`` is the time of Python and of torch's dispatcher.
"""

from __future__ import annotations

import io
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dtron.runtime.output import write_line
from dtron.runtime.trace import Category, Interval, Span, classify

ORDER: tuple[Category, ...] = ("matmul", "attention", "elementwise", "communication", "copy")


@dataclass(frozen=True)
class Breakdown:
    """Microseconds of a step. All but ``hidden`` sum to ``span``.

    ``communication``: exposed communication.
    ``hidden``: communication that runs at the same time as compute."""

    span: float
    matmul: float
    attention: float
    elementwise: float
    communication: float
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
    step = [(busy[0][0], busy[-1][1])]
    return Breakdown(
        span=length(step),
        idle=length(subtract(step, busy)),
        hidden=length(of["communication"]) - counted["communication"],
        **counted,
    )


# ---- intervals; lists of intervals are sorted and disjoint unless stated otherwise


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the union of intervals. The input may be unsorted and may overlap."""
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
        while first < len(b) and b[first][1] <= start:  # ends before this and all later intervals
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


# ---- output


def rows(b: Breakdown) -> list[tuple[str, str, str]]:
    """Return the rows of the breakdown: name, milliseconds, share of the span."""
    parts = [
        ("matmul", b.matmul),
        ("attention", b.attention),
        ("elementwise", b.elementwise),
        ("communication, exposed", b.communication),
        ("memory copies", b.copy),
        ("idle", b.idle),
        ("the step", b.span),
        ("communication, hidden", b.hidden),
    ]
    return [(name, f"{us / 1e3:.2f}", f"{us / b.span:.1%}") for name, us in parts]


def top(spans: Sequence[Span], n: int) -> list[str]:
    """Return the ``n`` kernels with the most total time, one line each."""
    times = defaultdict(list)
    for s in spans:
        times[s.name].append(s.end - s.start)
    totals = [(sum(us), len(us), name) for name, us in times.items()]
    most = sorted(totals, key=lambda row: -row[0])[:n]
    return [
        f"{us / 1e3:>9.2f} ms {calls:>6} x  {classify(name):<13}  {name[:140]}"
        for us, calls, name in most
    ]


def show(spans: Sequence[Span]) -> None:
    """Print the breakdown as a table."""
    from rich.console import Console  # imported late: the benchmarks run without rich
    from rich.table import Column, Table

    table = Table("one step", Column("ms", justify="right"), Column("share", justify="right"))
    for line in rows(breakdown(spans)):
        table.add_row(*line, end_section=line[0] in ("idle", "the step"))
    terminal, text = Console(), io.StringIO()
    console = Console(file=text, width=terminal.width, force_terminal=terminal.is_terminal)
    console.print(table)
    write_line(sys.stdout, text.getvalue().rstrip("\n"))
