"""What the directory of a run says about the run: its config, its starts and its steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dtron.errors import UserError
from dtron.renamed import dotted
from dtron.runtime.config import RunConfig
from dtron.runtime.run_directory import read_config
from dtron.runtime.step_records import METRICS, STARTS, read_objects, read_steps


@dataclass(frozen=True)
class RunRecord:
    """A run, which may still be training.

    ``name``: what tells it from the other runs.
    ``starts``: a line of ``starts.jsonl`` for each start.
    ``steps``: the records of its steps."""

    name: str
    config: RunConfig
    starts: list[dict[str, Any]]
    steps: list[dict[str, Any]]

    @property
    def last(self) -> Mapping[str, Any]:
        """The record of the last step; empty if there is none."""
        return self.steps[-1] if self.steps else {}

    @property
    def state(self) -> str:
        done = self.last.get("step", 0)
        rest = "" if done >= self.config.steps else f" of {self.config.steps:,}"
        return f"{done:,}{rest} steps"

    @property
    def hours(self) -> float:
        """The hours of all steps. Validation and checkpoints are not counted."""
        return sum(self.numbers("step_seconds")) / 3600

    @property
    def best_validation(self) -> tuple[float, int] | None:
        """The lowest validation loss and its step; None if none was measured."""
        name = "validation_loss"
        found = [(x[name], x["step"]) for x in self.steps if is_number(x.get(name))]
        return min(found, default=None)

    def numbers(self, name: str) -> list[float]:
        """Return the finite numbers of this name, of all steps that have one."""
        return [x[name] for x in self.steps if is_number(x.get(name))]

    @property
    def mesh(self) -> str:
        """The mesh of the last start; without a start, that of the config."""
        found = self.starts[-1].get("mesh") if self.starts else None
        return found if isinstance(found, str) else self.config.mesh


def is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def read_records(paths: Sequence[str]) -> list[RunRecord]:
    """Read run directories. Raises UserError for a folder that is none, or is given twice."""
    places = [Path(path) for path in paths]
    for i, place in enumerate(places):
        if place.resolve() in [other.resolve() for other in places[:i]]:
            raise UserError(f"{place}: is given twice; give each run once")
    short = [place.resolve().name for place in places]
    names = short if len(set(short)) == len(short) else list(map(str, places))
    return [_read(place, name) for place, name in zip(places, names, strict=True)]


def _read(place: Path, name: str) -> RunRecord:
    config = read_config(place)
    return RunRecord(name, config, read_objects(place / STARTS), read_steps(place / METRICS))


def differences(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Return the values of the config in which runs differ, by dotted name."""
    values = [dotted(asdict(run.config)) for run in runs]
    names = [name for name in values[0] if name not in ("run_dir", "resume")]
    rows = {name: [of_run.get(name) for of_run in values] for name in names}
    return {name: row for name, row in rows.items() if any(x != row[0] for x in row)}


def count_text(n: float) -> str:
    """Return a number in three digits, as 1.25M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.3g}"


def time_text(hours: float) -> str:
    """Return hours in a fitting unit."""
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.1f} s"
