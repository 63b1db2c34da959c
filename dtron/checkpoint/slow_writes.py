"""Finds the ranks that write their file of a checkpoint much more slowly than the other ranks: a
disk that fails, or a host whose network is slow."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

FACTOR = 3.0  # over the median
LEAST = 1.0  # seconds above the median; less is the noise of a shared file system


class Write(NamedTuple):
    """How a rank has written its file.

    ``host``: its name.
    ``size``: in bytes."""

    host: str
    size: int
    seconds: float


def slow_writes(writes: Sequence[Write], folder: Any) -> list[str]:
    """Return a line for each rank that is far slower than the median rank. A file that is larger
    than the median file may take longer in proportion.

    ``writes``: of each rank.
    ``folder``: where they wrote, for the message."""
    # With two ranks, or as many slow ranks as fast ones, the fast ones are the measure.
    median = statistics.median_low([w.seconds for w in writes])
    size = statistics.median_low([w.size for w in writes])
    lines = []
    for r, w in enumerate(writes):
        usual = median * max(1.0, w.size / max(size, 1))
        if w.seconds > FACTOR * usual and w.seconds - usual > LEAST:
            lines.append(
                f"rank {r} ({w.host}) took {w.seconds:.1f} s to write {w.size / 1e6:.1f} MB, the "
                f"median rank {median:.1f} s; look at the disk and the network of {w.host}, under "
                f"{folder}"
            )
    return lines
