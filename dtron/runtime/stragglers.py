"""Finds the ranks that slow a run down, and names what is slow. Pure functions of numbers.

In a synchronous step all ranks take the same time: a fast rank waits for a slow rank in the next
collective. So the time of a step does not say which rank is slow. These numbers do, because no
other rank has a part in them:

    data            seconds a step in which the rank's host waits for data, and its device for the
                    host
    host            seconds a step in which the rank's host works, and its device waits for it
    pauses          seconds a step in which the rank's process stands still: it is stopped, or other
                    programs have its CPU cores
    compute         seconds of a small fixed matmul on the rank's device
    communication   seconds of a small fixed message to the next rank and from the previous rank

A rank is slow if its number is far above the median of all ranks. A message has two ranks, and both
see a slow link. So a rank's messages count as slow only if its two neighbours see it too.

A number may be high once: another program ran for a moment. So a rank is reported when it is slow
in two looks in a row.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CAUSES = ("data", "host", "pauses", "compute", "communication")
OF_A_STEP = 0.1  # seconds of data, host and pauses above the median, over the seconds of a step
OF_COMPUTE = 1.15  # a probe's time over the median
OF_MESSAGES = 1.5
LOOKS = 2  # in a row in which a rank must be slow


@dataclass(frozen=True)
class Slow:
    """A rank that is slow.

    ``seconds``: its number.
    ``median``: the median of all ranks."""

    rank: int
    cause: str
    seconds: float
    median: float


def slow_ranks(
    step: Sequence[float], numbers: Mapping[str, Sequence[float]], stride: int = 1
) -> list[Slow]:
    """Return the slow ranks, by rank.

    ``step``: the seconds of a step, of each rank.
    ``numbers``: for each of ``CAUSES``, the number of each rank; NaN: not measured.
    ``stride``: the distance between two ranks that exchange a message."""
    found = []
    typical = statistics.median_low(step)
    for cause in CAUSES:
        values = numbers[cause]
        if len(values) < 2 or any(x != x for x in values):
            continue
        if cause == "communication":
            n = len(values)
            values = [
                min(values[(r - stride) % n], values[r], values[(r + stride) % n]) for r in range(n)
            ]
        # With two ranks, or as many slow ranks as fast ones, the fast ones are the measure.
        median = statistics.median_low(values)
        found += [
            Slow(r, cause, x, median)
            for r, x in enumerate(values)
            if _is_slow(cause, x, median, typical)
        ]
    return sorted(found, key=lambda slow: slow.rank)


def _is_slow(cause: str, x: float, median: float, step: float) -> bool:
    if cause in ("data", "host", "pauses"):
        return x - median > OF_A_STEP * step
    return x > median * (OF_COMPUTE if cause == "compute" else OF_MESSAGES)


def describe(slow: Slow) -> str:
    """Say what is slow."""
    of, median = (_seconds(x) for x in (slow.seconds, slow.median))
    match slow.cause:
        case "data":
            return f"its host waits {of} a step for data, the median rank {median}"
        case "host":
            return f"its host works {of} a step, the median rank {median}"
        case "pauses":
            return (
                f"its process stands still {of} a step, the median rank {median}; something stops "
                "it, or other programs have its CPU cores"
            )
        case "compute":
            return f"its device takes {of} for a fixed matmul, the median rank {median}"
    return f"its messages take {of}, the messages of the median rank {median}"


def _seconds(x: float) -> str:
    return f"{x:.3g} s" if x >= 1 else f"{1e3 * x:.3g} ms" if x >= 1e-3 else f"{1e6 * x:.3g} us"


class Persistent:
    """Reports what holds in ``LOOKS`` looks in a row, once, until it holds no longer."""

    def __init__(self) -> None:
        self._looks: dict[tuple[int, str], int] = {}

    def note(self, found: Mapping[tuple[int, str], str]) -> list[str]:
        """Return the texts that are due.

        ``found``: the text of each rank and cause of this look."""
        self._looks = {key: self._looks.get(key, 0) + 1 for key in found}
        return [text for key, text in found.items() if self._looks[key] == LOOKS]
