"""The seam of trackers: services and files of others that show the metrics of a run.

A tracker is one file, ``NAME_tracker.py`` in this folder, with a function ``open_tracker(About)``,
and a row of ``TRACKERS``. The file is imported when ``--track`` names it. Its package is an extra
of dtron.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from dtron.errors import UserError

# A tracker's name, and the package that it needs.
TRACKERS = {"wandb": "wandb", "mlflow": "mlflow", "tensorboard": "tensorboard"}

Ending = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class About:
    """What a tracker is told of a run.

    ``config``: the values of the config by dotted name.
    ``start``: the record of this start: commit, versions, mesh, device (``starts.jsonl``).
    ``step``: the steps that are done; 0: a new run.
    ``known_as``: the id that the tracker gave to this run at an earlier start; None: it gave none,
        or this is a new run."""

    name: str
    project: str
    run_dir: Path
    config: Mapping[str, Any]
    start: Mapping[str, Any]
    step: int
    known_as: str | None = None


class Tracker(Protocol):
    """A run that is tracked. All methods are called in one thread, and may raise."""

    @property
    def known_as(self) -> str | None:
        """The id with which a later start continues this run; None: it needs no id."""

    @property
    def place(self) -> str:
        """Where the user finds the run: an address or a folder."""

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add the records of steps, each as in ``metrics.jsonl``. A number that is None is
        unknown."""

    def close(self, ending: Ending) -> None:
        """Send everything, and end."""


def parse_trackers(text: str) -> tuple[str, ...]:
    """Read ``wandb,tensorboard``; ``none`` is no tracker. Raises UserError for another name."""
    names = tuple(name.strip() for name in text.split(",")) if text != "none" else ()
    for name in names:
        if name not in TRACKERS:
            known = ", ".join(TRACKERS)
            raise UserError(f"--track {text!r}: has {name!r}, which is none of {known}; use these")
        if names.count(name) > 1:
            raise UserError(f"--track {text!r}: has {name!r} twice; leave one out")
    return names


def check_installed(names: Sequence[str]) -> None:
    """Raise UserError for the first tracker whose package is not installed."""
    for name in names:
        spec = importlib.util.find_spec(TRACKERS[name])
        # A folder of this name is no package; W&B makes such a folder where a program runs.
        if spec is None or spec.origin is None:
            raise UserError(f"--track {name}: {name} is not installed; pip install 'dtron[{name}]'")


def open_tracker(name: str, about: About) -> Tracker:
    """Open a tracker. Raises what its package raises."""
    return importlib.import_module(f"dtron.runtime.trackers.{name}_tracker").open_tracker(about)
