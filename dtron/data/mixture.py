"""Several sources with weights: which one each sample of a run comes from.

The rule is greedy, and Megatron's: sample n comes from the source that is furthest behind its
share, ``weight * max(n, 1) - samples it gave so far``, the first of several that are equally far.
So after any number of samples, and not only on average, every source has given its share to within
a sample or so; and no random number is drawn.

What a source gives is counted: its samples are taken in its own order, from its first on. The
counts after n samples follow from n alone, and nothing else has to be kept to resume. They have no
formula, so they are counted anew, within a microsecond a sample, once at a resume. Left out:
weights that change in a run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dtron.data.indexed import prefix_of
from dtron.errors import UserError

SURPLUS = 0.005  # of each source's samples, that Megatron orders for a mixture beyond its share
_MARK = 1 << 16  # samples between remembered counts


def parse_sources(path: str | None) -> list[tuple[float, str | None]]:
    """``'0.7 web.jsonl, 0.3 code.parquet'`` -> weights that sum to 1, and paths; a path alone has
    weight 1.

    A source of weight 0 is left out. Raises UserError for a weight that is missing, negative, or no
    number, and where all are 0.
    """
    if path is None or Path(path).expanduser().exists() or prefix_of(path):
        return [(1.0, path)]
    parts = [
        re.fullmatch(r"\s*([-+]?[\d.][\w.+-]*|[-+]?inf|nan)\s+(\S.*?)\s*", part)
        for part in path.split(",")
    ]
    if not any(parts):
        return [(1.0, path)]
    found = []
    for part, text in zip(parts, path.split(","), strict=True):
        try:
            weight = float(part[1]) if part else math.nan
        except ValueError:
            weight = math.nan
        if not 0 <= weight < math.inf:
            raise UserError(
                f"--data.path {path!r}: {text.strip()!r} does not begin with a weight of 0 or more; write "
                "every source as WEIGHT PATH, as in '0.7 web.jsonl, 0.3 code.parquet'"
            )
        found.append((weight, part[2]))
    total = float(np.sum(np.array([weight for weight, _ in found])))
    if not total:
        raise UserError(
            f"--data.path {path!r}: the weights sum to 0; give at least one source more than that"
        )
    return [(weight / total, source) for weight, source in found if weight]


def samples_of(weight: float, samples: int, alone: bool) -> int:
    """How many samples a source's order is made for, in a run of ``samples``."""
    return samples if alone else math.ceil(math.ceil(samples * weight) * (1 + SURPLUS))


class Blend:
    """The greedy rule for weights that sum to 1."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = list(weights)
        self._marks = [[0] * len(self.weights)]  # the counts before sample k * _MARK

    def choose(self, start: int, count: int) -> tuple[list[int], np.ndarray]:
        """How many of samples 0 to ``start`` each source gave, and which gives each of the next
        ``count``."""
        mark = min(start // _MARK, len(self._marks) - 1)
        counts, chosen = list(self._marks[mark]), np.empty(count, np.int64)
        self._run(counts, mark * _MARK, start, None)
        before = list(counts)
        self._run(counts, start, start + count, chosen)
        return before, chosen

    def _run(self, counts: list[int], start: int, stop: int, chosen: np.ndarray | None) -> None:
        weights, marks, sources = self.weights, self._marks, range(len(self.weights))
        for n in range(start, stop):
            if n == len(marks) * _MARK:
                marks.append(list(counts))
            at = float(max(n, 1))
            behind = [w * at - c for w, c in zip(weights, counts)]  # noqa: B905
            best = behind.index(max(behind)) if len(sources) > 1 else 0
            counts[best] += 1
            if chosen is not None:
                chosen[n - start] = best
