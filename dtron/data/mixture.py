"""A mixture of several sources with weights: the choice of the source for each sample of a run.

The rule is Megatron's greedy rule. Sample n comes from the source that is furthest behind its
share. The distance is ``weight * max(n, 1) - samples it gave so far``. Of several sources at the
same distance the first is taken. So every source has given its share to within a sample or so after
any number of samples, and not only on average. No random number is drawn.

The samples of each source are counted, and they are taken in the source's own order from its first
sample on. The counts after n samples follow from n alone, so nothing else has to be stored to
resume. The counts have no formula. So they are recomputed once at a resume, within a microsecond
per sample. Left out: weights that change during a run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from dtron.data.files import expand
from dtron.data.indexed import prefix_of
from dtron.errors import UserError

SURPLUS = 0.005  # of a source's samples: Megatron orders this many beyond its share
_MARK = 1 << 16  # samples between remembered counts


def parse_sources(path: str | None) -> list[tuple[float, str | None]]:
    """Parse ``'0.7 web.jsonl, 0.3 code.parquet'`` into weights that sum to 1, and paths. A path
    alone has weight 1.

    A source of weight 0 is left out. Raises UserError for a weight that is missing, negative, or no
    number, and if all weights are 0."""
    if path is None or expand(path).exists() or prefix_of(path):
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
        if part is None or not 0 <= weight < math.inf:
            raise UserError(
                f"--data.path {path!r}: {text.strip()!r} does not begin with a weight of 0 or "
                "more; write every source as WEIGHT PATH, as in '0.7 web.jsonl, 0.3 code.parquet'"
            )
        found.append((weight, part[2]))
    total = float(np.sum(np.array([weight for weight, _ in found])))
    if not total:
        raise UserError(
            f"--data.path {path!r}: the weights sum to 0; give at least one source more than that"
        )
    return [(weight / total, source) for weight, source in found if weight]


def samples_of(weight: float, samples: int, alone: bool) -> int:
    """Return the number of samples that a source's order is made for, in a run of ``samples``."""
    return samples if alone else math.ceil(math.ceil(samples * weight) * (1 + SURPLUS))


class Blend:
    """The greedy rule for weights that sum to 1."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = list(weights)
        self._marks = [[0] * len(self.weights)]  # the counts before sample k * _MARK

    def choose(self, start: int, count: int) -> tuple[list[int], np.ndarray]:
        """Return the number of samples before ``start`` that each source gave, and the source of
        each of the next ``count`` samples."""
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
