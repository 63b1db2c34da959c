"""Records one training step with torch.profiler: ``train.py --profile``.

``python -m dtron.profile trace.json`` reads the trace again (tools/profile.py).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from dtron.errors import UserError
from dtron.runtime.config import RunConfig
from dtron.runtime.output import complain
from dtron.runtime.time_breakdown import show
from dtron.runtime.trace import Span, read

RECORDED_STEP = 5


class Recorder:
    """Records the ``step``-th step (0: none) to a file. Each process writes its own file. The
    first process shows the time breakdown.

    ``path``: the file; with several processes, ``-rankN`` is added to its stem.
    ``show``: receives the spans of the recorded step."""

    def __init__(
        self, path: Path, step: int, device: str, show: Callable[[Sequence[Span]], None] = show
    ) -> None:
        self._rank, name = int(os.environ.get("RANK", 0)), path.name
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            stem, dot, ending = name.partition(".")
            name = f"{stem}-rank{self._rank}{dot}{ending}"
        self._path, self._target, self._step, self._show = path.with_name(name), step, 0, show
        self._gpu = device.startswith("cuda")

    @classmethod
    def of_run(cls, config: RunConfig, run_dir: Path, done: int, device: str) -> Recorder:
        """Return a recorder of the fifth step of this process, or of the last one if there are
        fewer. The steps before it compile and allocate.

        ``done``: steps that an earlier process has trained."""
        step = min(RECORDED_STEP, config.steps - done) if config.profile else 0
        return cls(run_dir / "trace.json", step, device)

    def begin(self) -> None:
        """Mark the begin of a step."""
        from torch.profiler import ProfilerActivity, profile, record_function

        self._step += 1
        if self._target and self._step == max(self._target - 1, 1):
            # The start of the profiler takes so long that the device runs out of work. So the
            # profiler starts one step earlier, if there is an earlier step.
            gpu = [ProfilerActivity.CUDA] if self._gpu else []
            self._profiler = profile(activities=[ProfilerActivity.CPU, *gpu])
            with warnings.catch_warnings(action="ignore"):  # a warning about several cycles
                self._profiler.prepare_trace()
        if self._step == self._target:
            self._profiler.start_trace()
            self._mark = record_function(f"ProfilerStep#{self._step}")
            self._mark.__enter__()

    def end(self) -> bool:
        """Mark the end of a step, when the host has launched it. Return whether this step was
        recorded. If it was, the device is idle afterwards."""
        if self._step != self._target:
            return False
        self._mark.__exit__(None, None, None)
        self._profiler.stop_trace()  # waits for the device
        try:
            self._profiler.export_chrome_trace(str(self._path))
            if self._rank == 0:
                self._show(read(self._path))
        except (OSError, UserError) as error:  # a full disk is no reason to stop
            complain(f"warning: {self._path}: the trace cannot be written ({error})")
        return True
