"""The breakdown of a step's time against counting microseconds."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from hypothesis import find, given
from hypothesis import strategies as st

from dtron.runtime.time_breakdown import ORDER, Breakdown, breakdown, top
from dtron.runtime.trace import Span


@st.composite
def span(draw) -> Span:
    start, long = draw(st.integers(0, 30)), draw(st.integers(1, 12))
    return Span("", draw(st.sampled_from(ORDER)), start, start + long)


spans = st.lists(span(), min_size=1, max_size=12)


def counted(found: list[Span]) -> Breakdown:
    """The definition: for every microsecond, the kernels that run in it."""
    begin, end = min(s.start for s in found), max(s.end for s in found)
    times = dict.fromkeys(("span", *ORDER, "idle", "hidden"), 0)
    for t in range(begin, end):
        running = [c for c in ORDER if any(s.category == c and s.start <= t < s.end for s in found)]
        times["span"] += 1
        times[running[0] if running else "idle"] += 1
        times["hidden"] += "communication" in running and running[0] != "communication"
    return Breakdown(**times)


def close(a: Breakdown, b: Breakdown) -> bool:
    return asdict(a) == pytest.approx(asdict(b))


@given(spans)
def test_the_breakdown_is_what_counting_gives(found):
    assert close(breakdown(found), counted(found))


@given(spans)
def test_the_parts_sum_to_the_span(found):
    b = breakdown(found)
    assert (
        b.matmul + b.attention + b.elementwise + b.communication + b.copy + b.idle
        == pytest.approx(b.span)
    )
    assert 0 <= b.hidden <= sum(s.end - s.start for s in found if s.category == "communication")
    assert min(asdict(b).values()) >= 0


@given(spans, st.integers(-1000, 10**9), st.randoms())
def test_neither_when_nor_in_which_order_matters(found, shift, random):
    moved = [s._replace(start=s.start + shift, end=s.end + shift) for s in found]
    random.shuffle(moved)
    assert close(breakdown(moved), breakdown(found))


def no_overlap(found: list[Span]) -> Breakdown:
    """A mutant: kernel times are summed, so overlapping kernels count twice."""
    b = breakdown(found)
    total = {c: sum(s.end - s.start for s in found if s.category == c) for c in ORDER}
    return Breakdown(span=b.span, idle=b.span - sum(total.values()), hidden=0, **total)


def all_exposed(found: list[Span]) -> Breakdown:
    """A mutant: communication comes first, so none of it is hidden."""
    alone = breakdown([s for s in found if s.category == "communication"] or found)
    return Breakdown(
        **{**asdict(breakdown(found)), "communication": alone.communication, "hidden": 0}
    )


@pytest.mark.parametrize("mutant", [no_overlap, all_exposed])
def test_a_breakdown_that_ignores_overlap_is_noticed(mutant):
    assert find(spans, lambda found: not close(mutant(found), counted(found)))


def test_a_step_by_hand():
    """Two matmuls with a gap. A collective begins during the first and ends in the gap."""
    found = [
        Span("", "matmul", 0, 10),
        Span("", "communication", 6, 13),
        Span("", "matmul", 15, 20),
    ]
    assert breakdown(found) == Breakdown(
        span=20, matmul=15, attention=0, elementwise=0, communication=3, copy=0, idle=2, hidden=4
    )


def test_the_names_with_most_time_come_first():
    found = [Span("a", "matmul", 0, 3000), Span("b", "copy", 0, 5000), Span("a", "matmul", 0, 4000)]
    assert [line.split() for line in top(found, 1)] == [
        ["7.00", "ms", "2", "x", "elementwise", "a"]
    ]
    assert len(top(found, 5)) == 2
