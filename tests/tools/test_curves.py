"""Curves of a report: what thinning and smoothing keep, and the ticks of an axis."""

from __future__ import annotations

import math
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from dtron.testing import assert_caught
from dtron.tools import curve_chart, curves
from dtron.tools.curves import EvenSample, Point, ThinnedCurve, smooth, thin

NUMBERS = st.none() | st.floats(-1e6, 1e6)


@given(st.lists(NUMBERS, max_size=300), st.integers(4, 60))
def test_a_thinned_curve_keeps_ends_and_extremes(numbers, most):
    points = list(enumerate(numbers))
    kept = thin(points, most)
    assert sorted(set(kept)) == kept if None not in numbers else len(set(kept)) == len(kept)
    assert set(kept) <= set(points) and len(kept) <= 1.5 * most + 2
    if points:
        assert (kept[0], kept[-1]) == (points[0], points[-1])
    known = [x for x in numbers if x is not None]
    shown = [x for _, x in kept if x is not None]
    assert bool(known) == bool(shown)
    if known:
        assert (min(known), max(known)) == (min(shown), max(shown))
    if len(points) <= most:
        assert kept == points


def thinned(numbers: list[float | None], most: int) -> ThinnedCurve:
    curve = ThinnedCurve(most)
    for step, x in enumerate(numbers):
        curve.add(step, x)
    return curve


@given(st.lists(NUMBERS, max_size=300), st.integers(1, 20))
def test_a_curve_that_is_read_step_by_step_keeps_ends_and_extremes(numbers, most):
    points: list[Point] = list(enumerate(numbers))
    reader = thinned(numbers, most)
    kept, means = reader.curve()
    assert len(reader.parts) <= 2 * most and len(kept) <= 6 * most + 2
    assert len(set(kept)) == len(kept) and [s for s, _ in kept] == sorted(s for s, _ in kept)
    assert set(kept) <= set(points) and kept[:1] == points[:1] and kept[-1:] == points[-1:]
    known, shown = ([x for _, x in ps if x is not None] for ps in (points, kept))
    assert bool(known) == bool(shown) == bool(means)
    if len(known) < len(points):
        assert None in [x for _, x in kept]
    if known:
        assert (min(known), max(known)) == (min(shown), max(shown))
        assert all(min(known) - 1e-6 <= x <= max(known) + 1e-6 for _, x in means)
        total = sum(part.total for part in reader.parts)
        assert math.isclose(total, sum(known), rel_tol=1e-9, abs_tol=1e-3)
    if len(points) <= 2 * most:
        assert kept == points and means == [p for p in points if p[1] is not None]


def keeps_a_spike() -> None:
    numbers: list[float | None] = [0.0] * 300
    numbers[137] = 9.0
    assert (137, 9.0) in thinned(numbers, 10).curve().points


def test_a_reader_that_loses_a_spike_is_caught():
    """Mutant: of each part the first point is kept, and no extreme."""
    keeps_a_spike()
    with mock.patch.object(curves, "_extremes", lambda points: points[:1]):
        assert_caught(keeps_a_spike)


@given(st.integers(0, 400))
def test_an_even_sample_is_even(count):
    sample = EvenSample(most=20)
    for i in range(count):
        sample.add(i)
    assert sample.kept == list(range(0, count, sample.distance))
    assert min(count, 10) <= len(sample.kept) <= 20


@given(st.lists(NUMBERS, max_size=60))
def test_a_smoothed_curve_stays_between_the_extremes(numbers):
    known = [(i, x) for i, x in enumerate(numbers) if x is not None]
    found = smooth(list(enumerate(numbers)))
    assert [step for step, _ in found] == [step for step, _ in known]
    values = [x for _, x in known]
    assert all(min(values) - 1e-6 <= x <= max(values) + 1e-6 for _, x in found)


def test_a_smoothed_line_does_not_lag():
    line = [(i, float(i)) for i in range(1000)]
    assert all(abs(x - i) < 1e-3 for i, x in smooth(line)[200:800])


def test_a_smoothed_curve_that_lags_is_caught():
    """Mutant: the average from one end alone."""
    one_way = curves._average
    backward = mock.Mock(side_effect=lambda xs, keep: one_way(xs, keep) if xs[0] == 0 else xs)
    with mock.patch.object(curves, "_average", backward):
        assert_caught(test_a_smoothed_line_does_not_lag)


@given(st.floats(-1e6, 1e6), st.floats(1e-5, 1e6), st.booleans())
def test_ticks_are_round_few_and_within(low, span, whole):
    if whole:
        low, span = float(round(low)), math.ceil(span)
    axis = curve_chart.Axis(low, low + span, 0, 100)
    ticks = axis.ticks(5, whole)
    assert len(ticks) <= 11 and ticks == sorted(set(ticks))
    assert all(low - 1e-6 * span <= x <= low + span * (1 + 1e-6) for x in ticks)
    assert ticks or span < 2
    assert not whole or all(x == round(x) for x in ticks)
