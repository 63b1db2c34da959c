"""Weights & Biases (``--track wandb``). Its variables of the environment say the account and the
mode: with ``WANDB_MODE=offline`` the run is a folder in the run directory, for ``wandb sync``.

Left out: the step of W&B itself. It may only grow, and a run that goes on from a checkpoint trains
some steps again. The field ``step`` is the x axis instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from dtron.renamed import nested
from dtron.runtime.trackers.tracker import About, Ending


class WandbRun:
    def __init__(self, about: About) -> None:
        # Neither its lines nor its capture of the standard output: the log is the log of the run.
        settings = wandb.Settings(console="off", silent=True)
        self._run = wandb.init(
            project=about.project,
            name=about.name,
            dir=about.run_dir,
            config=nested(about.config) | {"start": dict(about.start)},
            id=about.known_as,
            resume="allow",
            allow_val_change=True,
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")

    @property
    def known_as(self) -> str | None:
        return self._run.id

    @property
    def place(self) -> str:
        return str(Path(self._run.dir).parent) if self._run.offline else str(self._run.url)

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        for record in records:
            self._run.log({name: value for name, value in record.items() if value is not None})

    def close(self, ending: Ending) -> None:
        self._run.finish(exit_code=1 if ending == "failed" else 0)


def open_tracker(about: About) -> WandbRun:
    return WandbRun(about)
