"""Parts of charts that several pages draw: a scale with its axis, and lanes of busy time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dtron.tools.html_page import FAINT, RULE
from dtron.tools.svg import Canvas


@dataclass(frozen=True)
class Scale:
    """From values to pixels.

    ``most``: the value at the far end; the near end is 0.
    ``start``: the pixel of 0.
    ``length``: pixels from 0 to ``most``; negative where the axis goes up or to the left."""

    most: float
    start: float
    length: float

    def __call__(self, value: float) -> float:
        return self.start + self.size(value)

    def size(self, value: float) -> float:
        """Return the pixels between 0 and a value."""
        return self.length * value / self.most

    def ticks(self, about: int = 6) -> list[float]:
        """Return round values from 0 to the end, about so many."""
        rough = self.most / about
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * n for n in (1, 2, 2.5, 5, 10) if unit * n >= rough)
        return [step * i for i in range(int(self.most / step + 1e-9) + 1)]


def tick_text(value: float) -> str:
    return f"{value:,.10g}" if value < 1 else f"{value:,.6g}"


def axis_below(canvas: Canvas, scale: Scale, top: float, bottom: float, unit: str) -> None:
    """Draw vertical lines at round values, with the values below them."""
    for value in scale.ticks():
        x = scale(value)
        canvas.line([(x, top), (x, bottom)], RULE)
        canvas.text(x, bottom + 15, tick_text(value), size=11, anchor="middle", colour=FAINT)
    canvas.text(scale(scale.most), bottom + 31, unit, size=11, anchor="end", colour=FAINT)


def shares(parts: Iterable[tuple[float, float]], most: float, bins: int) -> list[float]:
    """Return the share of each bin of time that is covered.

    ``parts``: starts and ends. They may overlap.
    ``most``: the end of the last bin."""
    covered = [0.0] * bins
    for start, end in _joined(parts):
        low, high = start / most * bins, end / most * bins
        first, last = int(low), min(int(high), bins - 1)
        for i in range(first, last + 1):
            covered[i] += max(0.0, min(high, i + 1) - max(low, i))
    return [min(x, 1.0) for x in covered]


def _joined(parts: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the same time without overlap."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(part for part in parts if part[1] > part[0]):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def lane(canvas: Canvas, scale: Scale, top: float, heights: Sequence[float], fill: str) -> None:
    """Draw how much of each bin of time is covered, as heights in pixels above a lane's bottom.

    ``heights``: pixels of each bin, of a lane that is 10 pixels high."""
    each, d, before = scale.length / len(heights), "M0 10", 0.0
    for i, height in enumerate(heights):
        if height != before:
            d += f"H{i * each:.1f}V{10 - height:.1f}"
            before = height
    canvas.path(scale.start, top, f"{d}H{scale.length:.1f}V10Z", fill, height=10)
