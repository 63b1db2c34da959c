"""What the directory of a run says about the run: its config, its starts and its steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeGuard

from dtron.errors import UserError
from dtron.renamed import dotted
from dtron.runtime.config import RunConfig
from dtron.runtime.run_directory import read_config
from dtron.runtime.step_records import METRICS as STEPS
from dtron.runtime.step_records import STARTS, each_object, each_step
from dtron.tools.curves import METRICS, Curve, EvenSample, ThinnedCurve


@dataclass(frozen=True)
class RunRecord:
    """A run, which may still be training.

    ``name``: what tells it from the other runs.
    ``starts``: a line of ``starts.jsonl`` for each start.
    ``steps``: the number of its steps.
    ``last``: the record of the last step; empty if there is none.
    ``hours``: the hours of all steps. Validation and checkpoints are not counted.
    ``best_validation``: the lowest validation loss and its step; None if none was measured.
    ``tokens_per_s``: the median; None if no step has a speed.
    ``curves``: the curves of ``METRICS``, by the metric's name."""

    name: str
    config: RunConfig
    starts: list[dict[str, Any]]
    steps: int
    last: Mapping[str, Any]
    hours: float
    best_validation: tuple[float, int] | None
    tokens_per_s: float | None
    curves: Mapping[str, Curve]

    @property
    def state(self) -> str:
        done = self.last.get("step", 0)
        rest = "" if done >= self.config.steps else f" of {self.config.steps:,}"
        return f"{done:,}{rest} steps"

    @property
    def mesh(self) -> str:
        """The mesh of the last start; without a start, that of the config."""
        found = self.starts[-1].get("mesh") if self.starts else None
        return found if isinstance(found, str) else self.config.mesh


def is_number(x: Any) -> TypeGuard[float]:
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
    """Read a run. The memory that this takes does not grow with the number of steps."""
    config, starts = read_config(place), list(each_object(place / STARTS))
    curves = {metric.name: ThinnedCurve() for metric in METRICS}
    best: tuple[float, int] | None = None
    steps, seconds, last, speeds = 0, 0.0, dict[str, Any](), EvenSample()
    for last in each_step(place / STEPS):
        steps += 1
        for metric in METRICS:
            x = metric.of(last)
            if x is None or not math.isnan(x):
                curves[metric.name].add(last["step"], x)
        took, speed, loss = map(last.get, ("step_seconds", "tokens_per_s", "validation_loss"))
        seconds += took if is_number(took) else 0.0
        if is_number(speed):
            speeds.add(speed)
        if is_number(loss):
            best = min(best or (loss, last["step"]), (loss, last["step"]))
    middle = median(speeds.kept) if speeds.kept else None
    found = {key: thinned.curve() for key, thinned in curves.items()}
    return RunRecord(name, config, starts, steps, last, seconds / 3600, best, middle, found)


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
