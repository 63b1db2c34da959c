"""TensorBoard: event files in the run directory (``--track tensorboard``)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from dtron.runtime.trackers.tracker import About, Ending


class TensorBoardRun:
    """Event files. A later start hides the events after the step from which it goes on."""

    known_as = None

    def __init__(self, about: About) -> None:
        self.place = str(about.run_dir)
        self._writer = SummaryWriter(self.place, purge_step=about.step + 1)
        for title, values in (("config", about.config), ("start", about.start)):
            text = json.dumps(values, indent=1)
            self._writer.add_text(title, f"```json\n{text}\n```", about.step)

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        for record in records:
            for name, value in record.items():
                if value is not None and name != "step":
                    self._writer.add_scalar(name, value, record["step"])

    def close(self, ending: Ending) -> None:
        self._writer.close()


def open_tracker(about: About) -> TensorBoardRun:
    return TensorBoardRun(about)
