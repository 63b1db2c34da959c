"""A batch ramp: the global batch grows during the run (Megatron's ``--rampup-batch-size``; GPT-3,
Brown et al. 2020, arXiv:2005.14165, section 2.3; Smith et al. 2018, arXiv:1711.00489).

    --batch 64                              64 sequences in every step
    --batch '64:0, 256:1000'                from step 1000 on 256
    --batch '64:0, 256:2B, 512:10B'         from 2 billion tokens on 256, from 10 billion on 512

Early gradients point in one direction, so a small batch estimates them well and gives more updates
for the same tokens. Later gradients are noisier, and a larger batch keeps more devices busy.

The size of a step is a function of two numbers that a checkpoint has: the steps that are done, and
the samples that they have used. A point in tokens counts the tokens of whole samples, so it does
not depend on padding or masks. A step uses the samples that follow those of the step before. So the
order of the samples does not depend on the ramp.

Left out: points in steps and in tokens in one ramp.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from dtron.errors import UserError

LARGEST_BATCH = 10**8  # sequences
LARGEST_POINT = 1 << 62  # steps or tokens
UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}
FORM = "as '64:0, 256:2B': a size, and from which step (1000) or number of tokens (K, M, B) on"


class Phase(NamedTuple):
    """Consecutive steps with one batch size.

    ``steps``: the number of the steps.
    ``samples``: the samples that the run has used before them.
    ``size``: the samples of each step."""

    steps: int
    samples: int
    size: int


@dataclass(frozen=True)
class BatchRamp:
    """The sizes of the global batch, and where each begins.

    ``begins``: the number of steps, or of samples if ``in_samples``, after which a size begins. The
        first is 0."""

    sizes: tuple[int, ...]
    begins: tuple[int, ...] = (0,)
    in_samples: bool = False

    @property
    def ramps(self) -> bool:
        """Whether there is more than one size."""
        return len(self.sizes) > 1

    def size(self, step: int, samples: int) -> int:
        """Return the size of the next batch, after so many steps and samples."""
        done = samples if self.in_samples else step
        return self.sizes[bisect_right(self.begins, done) - 1]

    def phases(self, steps: int, step: int = 0, samples: int = 0) -> Iterator[Phase]:
        """Yield the phases of a run of ``steps`` steps, after its first ``step`` steps and
        ``samples`` samples."""
        while step < steps:
            size, count = self.size(step, samples), steps - step
            done = samples if self.in_samples else step
            next_size = bisect_right(self.begins, done)
            if next_size < len(self.begins):
                left = self.begins[next_size] - done
                count = min(count, -(-left // size) if self.in_samples else left)
            yield Phase(count, samples, size)
            step, samples = step + count, samples + count * size

    def samples_after(self, steps: int, step: int = 0, samples: int = 0) -> int:
        """Return the number of samples that a run has used after ``steps`` steps; the last two
        arguments are those of ``phases``."""
        return samples + sum(p.steps * p.size for p in self.phases(steps, step, samples))


def parse_batch(batch: int | str, seq_len: int) -> BatchRamp:
    """Parse the value of ``--batch``: a size, or a ramp. Raises UserError for a value that is
    neither.

    ``seq_len``: tokens of a sample."""
    if isinstance(batch, int):
        if batch < 1:
            raise UserError(f"--batch {batch}: must be at least 1; use --batch 1")
        return BatchRamp((batch,))
    where = f"--batch {batch!r}"
    entries = [part.split(":") for part in batch.split(",")]
    if any(len(entry) != 2 for entry in entries):
        raise UserError(f"{where}: must be a number of sequences, or a ramp {FORM}; change it")
    sizes = [_size(size, where) for size, _ in entries]
    points = [_point(point, where) for _, point in entries]
    if points[0][0] != 0:
        raise UserError(f"{where}: the first size must begin at 0; write {sizes[0]}:0")
    for (a, _), (b, _) in pairwise(points):
        if a >= b:
            raise UserError(f"{where}: each size must begin after the one before; raise {b:,}")
    units = {in_tokens for value, in_tokens in points if value}
    if len(units) > 1:
        raise UserError(
            f"{where}: some points are steps, and others are tokens; write all in one of the two"
        )
    in_tokens = units == {True}
    begins = tuple(-(-value // seq_len) if in_tokens else value for value, _ in points)
    return BatchRamp(tuple(sizes), begins, in_tokens)


def _size(text: str, where: str) -> int:
    text = text.strip()
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{where}: {text!r} is no number of sequences; write a ramp {FORM}")
    size = int(text[:20])  # more digits are too large anyway
    if not 1 <= size <= LARGEST_BATCH:
        raise UserError(
            f"{where}: {text[:20]} sequences; a batch has from 1 to {LARGEST_BATCH}; change it"
        )
    return size


def _point(text: str, where: str) -> tuple[int, bool]:
    """Return a point, and whether it is in tokens."""
    text = text.strip()
    unit = UNITS.get(text[-1:])
    digits = text[:-1] if unit else text
    whole, dot, part = digits.partition(".")
    decimals = (whole + part).isascii() and (whole + part).isdigit() and len(whole + part) <= 20
    if not decimals or not whole or bool(dot) != bool(part) or (dot and not unit):
        raise UserError(f"{where}: {text!r} is no point of a run; write a ramp {FORM}")
    value = int(whole + part) * (unit or 1) // 10 ** len(part)
    if value > LARGEST_POINT:
        raise UserError(f"{where}: {text} is more than any run has; lower it")
    return value, unit is not None
