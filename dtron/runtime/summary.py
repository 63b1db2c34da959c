"""The summary of a run, printed at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class Summary:
    """Adds up the steps of this process. Validation and checkpoints are no part of a step."""

    def __init__(self) -> None:
        self.steps, self.seconds, self.tokens = 0, 0.0, 0.0  # the tokens of these steps
        self._waited, self._saved, self._peak = 0.0, 0.0, 0.0
        self._mfu = 0.0  # times seconds
        self._losses: list[float] = []  # the first and the last
        self._best: tuple[float, int] | None = None
        self._skipped = 0

    def note(self, record: Mapping[str, Any]) -> None:
        """Add the record of a step."""
        seconds = record["step_seconds"]
        self.steps, self.seconds = self.steps + 1, self.seconds + seconds
        self.tokens += record["tokens_per_s"] * seconds
        self._waited += record["data_wait_ratio"] * seconds
        self._mfu += (record["mfu"] or 0.0) * seconds
        self._saved += record.get("checkpoint_stall_seconds", 0.0)
        self._peak = max(self._peak, record["peak_memory_gib"])
        self._skipped = record["skipped_steps"]
        self._losses = [*self._losses[:1], record["loss"]]
        loss = record.get("validation_loss")
        if loss is not None and math.isfinite(loss):
            found = (loss, record["step"])
            self._best = found if self._best is None else min(self._best, found)

    def text(self) -> str:
        """Return the summary in one line; empty if this process has trained no step."""
        if not self.steps:
            return ""
        parts = [
            f"summary: {self.steps:,} {'step' if self.steps == 1 else 'steps'} in "
            f"{duration(self.seconds)}, {self.tokens / self.seconds:,.0f} tokens/s"
            + (f", mfu {self._mfu / self.seconds:.1%}" if self._mfu else ""),
            f"loss {' to '.join(f'{x:.4f}' for x in self._losses)}",
        ]
        if self._best is not None:
            parts.append(f"best validation loss {self._best[0]:.4f} at step {self._best[1]:,}")
        parts.append(f"{self._waited / self.seconds:.1%} of the time waiting for data")
        if self._saved:
            parts.append(f"{self._saved:.1f} s for checkpoints")
        if self._skipped:
            parts.append(f"{self._skipped} skipped steps")
        parts.append(f"{self._peak:.1f} GiB at most")
        return "; ".join(parts)


def duration(seconds: float) -> str:
    """Return a time as 1:02:03 or 2:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
