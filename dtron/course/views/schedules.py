"""Pictures of pipeline schedules on one scale of time."""

from __future__ import annotations

from collections.abc import Iterable

from dtron.schedules import SCHEDULES, Costs, make, peaks, simulate
from dtron.tools.draw_schedules import svg


def schedules(ranks: int, microbatches: int, costs: Costs, names: Iterable[str] = SCHEDULES) -> str:
    """Draw schedules on one scale of time. With n stages per rank, a stage takes 1/n of the
    costs."""
    lines = {}
    for name in names:
        t = make(name, ranks, microbatches)
        n = t.per_rank
        line = simulate(t, Costs(costs.F / n, costs.I / n, costs.W / n, costs.transfer))
        lines[f"{name}: bubble {line.bubble:.1%}, at most {max(peaks(t)) / n:g} activations"] = line
    return svg(lines)


def two_schedules(
    first: str, second: str, ranks: int, microbatches: int, weight_gradient: float = 1.0
) -> str:
    """Draw two schedules. ``weight_gradient``: the time of a W, in forwards."""
    return schedules(ranks, microbatches, Costs(W=weight_gradient), dict.fromkeys((first, second)))
