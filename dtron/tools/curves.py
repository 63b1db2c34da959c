"""The curves of a run: numbers of ``metrics.jsonl`` over steps, thinned and smoothed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

Point = tuple[int, float | None]  # a step and a number; None: the number is not finite
MOST = 1000  # points of a curve, about


@dataclass(frozen=True)
class Metric:
    """A number of a step, which has a chart.

    ``name``: a name in ``metrics.jsonl``, or ``experts.*.`` and a name: then it is of all layers,
        joined by ``join``.
    ``from_zero``: the axis begins at 0.
    ``smooth``: the number is noisy, so the chart has a smoothed curve too.
    ``factor``: from the number to its unit."""

    name: str
    title: str
    unit: str = ""
    from_zero: bool = False
    smooth: bool = False
    factor: float = 1.0
    join: Callable[[list[float]], float] = max

    def of(self, record: Mapping[str, Any]) -> float | None:
        """Return the number of a step; NaN if the record does not have it."""
        if "*" in self.name:
            start, end = self.name.split("*")
            names = [name for name in record if name.startswith(start) and name.endswith(end)]
            found = [record[name] for name in names]
        else:
            found = [record[self.name]] if self.name in record else []
        if not found:
            return math.nan
        known = [x for x in found if isinstance(x, int | float) and math.isfinite(x)]
        return self.factor * self.join(known) if known else None


METRICS = (
    Metric("loss", "Loss", "nats per token", smooth=True),
    Metric("validation_loss", "Validation loss", "nats per token"),
    Metric("ema_validation_loss", "Validation loss of the averaged weights", "nats per token"),
    Metric("grad_norm", "Gradient norm", smooth=True),
    Metric("lr", "Learning rate", from_zero=True),
    Metric("tokens_per_s", "Tokens per second", from_zero=True, smooth=True),
    Metric("mfu", "MFU", "%", from_zero=True, smooth=True, factor=100),
    Metric("peak_memory_gib", "Peak memory of rank 0", "GiB"),
    Metric("data_wait_ratio", "Time waiting for data", "%", True, True, 100),
    Metric("experts.*.load_max", "Largest load of an expert", "of the mean load", smooth=True),
    Metric(
        "experts.*.load_min", "Smallest load of an expert", "of the mean load", True, True, 1.0, min
    ),
    Metric("experts.*.dropped", "Largest share of dropped slots", "%", True, True, 100),
    Metric("mtp.*.loss", "Largest loss of multi-token prediction", "nats per token", smooth=True),
    Metric("z_loss", "z-loss of the head", smooth=True),
    Metric("max_attention_logit", "Largest attention logit", smooth=True),
    Metric("gpu.sm_clock_mhz", "Lowest clock of a GPU's SMs", "MHz"),
    Metric("gpu.power_watts", "Power of all GPUs", "W", from_zero=True),
    Metric("gpu.temperature_c", "Highest temperature of a GPU", "degrees Celsius"),
    Metric("joules_per_token", "Energy of a token", "J", from_zero=True),
    Metric("ranks.data_seconds.max", "Longest wait of a rank for data", "s a step", True),
)


class Curve(NamedTuple):
    """A curve of a bounded number of points.

    ``points``: its points; of a long curve the extremes of each part (``ThinnedCurve``).
    ``means``: the mean of each part, for smoothing."""

    points: Sequence[Point]
    means: Sequence[Point]


@dataclass
class ThinnedCurve:
    """Takes the points of a curve one after the other, and keeps some thousands.

    The curve is kept in parts of ``size`` points each. Of each part the minimum, the maximum and a
    gap are kept, and the mean. When there are ``2 * most`` parts, each two become one."""

    most: int = MOST
    size: int = 1
    ends: list[Point] = field(default_factory=list)
    parts: list[_Part] = field(default_factory=list)

    def add(self, step: int, x: float | None) -> None:
        """Add the next point."""
        self.ends = [*self.ends[:1], (step, x)]
        one = _Part(1, step, 0 if x is None else 1, x or 0.0, [(step, x)])
        if self.parts and self.parts[-1].count < self.size:
            self.parts[-1] = self.parts[-1].joined(one)
            return
        if len(self.parts) == 2 * self.most:
            self.parts = [a.joined(b) for a, b in zip(*[iter(self.parts)] * 2, strict=True)]
            self.size *= 2
        self.parts.append(one)

    def curve(self) -> Curve:
        """Return the curve so far, with its first and its last point."""
        points = [point for part in self.parts for point in part.kept]
        first, last = self.ends[:1], self.ends[-1:]
        points = (first if points[:1] != first else []) + points
        points += last if points[-1:] != last else []
        known = [part for part in self.parts if part.known]
        means = [(round(p.steps / p.count), p.total / p.known) for p in known]
        return Curve(points, means)


@dataclass(frozen=True)
class _Part:
    """Consecutive points of a curve.

    ``count``, ``steps``: the number of points, and the sum of their steps.
    ``known``, ``total``: the number of the finite ones, and their sum.
    ``kept``: the extremes, in order."""

    count: int
    steps: int
    known: int
    total: float
    kept: list[Point]

    def joined(self, other: _Part) -> _Part:
        """Return this part and the next one as one part."""
        return _Part(
            self.count + other.count,
            self.steps + other.steps,
            self.known + other.known,
            self.total + other.total,
            _extremes(self.kept + other.kept),
        )


def _extremes(points: Sequence[Point]) -> list[Point]:
    """Return the minimum, the maximum and the first gap of some points, in order."""
    numbers = {i: x for i, (_, x) in enumerate(points) if x is not None}
    keep = set([i for i in range(len(points)) if i not in numbers][:1])
    if numbers:
        keep |= {min(numbers, key=numbers.__getitem__), max(numbers, key=numbers.__getitem__)}
    return [points[i] for i in sorted(keep)]


@dataclass
class EvenSample:
    """Takes numbers one after the other, and keeps some thousands at even distances."""

    most: int = 4 * MOST
    kept: list[float] = field(default_factory=list)
    seen: int = 0
    distance: int = 1

    def add(self, x: float) -> None:
        """Add the next number."""
        if self.seen % self.distance == 0:
            self.kept.append(x)
        self.seen += 1
        if len(self.kept) > self.most:
            self.kept, self.distance = self.kept[::2], 2 * self.distance


def thin(points: Sequence[Point], most: int = MOST) -> list[Point]:
    """Return about ``most`` points at most: the first, the last, and of each part of the curve its
    minimum, its maximum and a gap. So no spike is lost."""
    if len(points) <= most:
        return list(points)
    parts, inner = max(1, (most - 2) // 2), points[1:-1]
    cuts = [i * len(inner) // parts for i in range(parts + 1)]
    kept = [p for a, b in pairwise(cuts) for p in _extremes(inner[a:b])]
    return [points[0], *kept, points[-1]]


def smooth(points: Sequence[Point], share: float = 0.005) -> list[Point]:
    """Return the mean of two exponential moving averages, one from each end: so the curve does not
    lag behind. A gap is passed over.

    ``share``: the number of points in which a weight falls by half, over all points."""
    known = [(step, x) for step, x in points if x is not None]
    keep = 0.5 ** (1 / max(1.0, share * len(known)))
    ahead = _average([x for _, x in known], keep)
    back = _average([x for _, x in reversed(known)], keep)[::-1]
    return [(step, (a + b) / 2) for (step, _), a, b in zip(known, ahead, back, strict=True)]


def _average(numbers: Sequence[float], keep: float) -> list[float]:
    """Return the exponential moving average, without the bias of its start."""
    total, weight, found = 0.0, 0.0, list[float]()
    for x in numbers:
        total, weight = keep * total + (1 - keep) * x, keep * weight + 1 - keep
        found.append(total / weight)
    return found


def segments(points: Sequence[Point]) -> Iterator[list[tuple[int, float]]]:
    """Yield the parts of a curve between its gaps."""
    part: list[tuple[int, float]] = []
    for step, x in points:
        if x is not None:
            part.append((step, x))
        elif part:
            yield part
            part = []
    if part:
        yield part
