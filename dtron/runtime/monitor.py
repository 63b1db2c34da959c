"""Observes a run while it trains: the log, the watch of ranks, the check of replicas, and the
profile of one step.

None of them makes a rank wait for its device or for another rank in the middle of training. So each
has two moments in a step: the begin, and the moment when the host has launched the step. At the
second moment each reads the results of an earlier step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dtron.checkpoint import TrainState
from dtron.runtime.batches import GlobalBatch
from dtron.runtime.compile_cache import describe_first_step
from dtron.runtime.config import RunConfig
from dtron.runtime.profiler import Recorder
from dtron.runtime.rank_watch import RankWatch
from dtron.runtime.replica_check import ReplicaCheck
from dtron.runtime.run_directory import RunDirectory
from dtron.runtime.step_log import StepLog
from dtron.training.config import RunPlan
from dtron.training.lr_schedule import Rates
from dtron.training.pipeline import Pipeline
from dtron.training.reports import StepReports


@dataclass
class Monitor:
    """Observes a run. All ranks make the same calls.

    ``notes``: lines for the begin of the log.
    ``compiles``: the next step compiles."""

    log: StepLog
    watch: RankWatch
    replicas: ReplicaCheck
    recorder: Recorder
    notes: tuple[str, ...]
    compiles: bool

    def begin(self) -> None:
        """Mark the begin of a step on the host."""
        self.recorder.begin()
        self.watch.begin()

    def launched(
        self,
        state: TrainState,
        batch: GlobalBatch,
        rates: Rates,
        loss: Tensor,
        grad_norm: Tensor,
        reports: StepReports,
    ) -> None:
        """Take the results of a step that the host has launched, and the state after it. The step
        before is over, and its line is written. Raises UserError if replicas differ."""
        seconds = time.perf_counter() - batch.ready
        if self.compiles:
            self.log.say(describe_first_step(seconds))
            self.compiles = False
        self.replicas.launch(state)
        self.log.launched(state, batch, rates, loss, grad_norm, reports)
        waited = batch.wait_seconds, seconds, self.log.wait_seconds
        self.log.note(self.watch.end(state.step, batch.valid, *waited))
        self.replicas.advance(state.step)

    def end(self, waits: bool) -> None:
        """Mark the end of a step on the host. ``waits``: the host is to wait for the device."""
        if self.recorder.end() or waits:
            self.log.finish()

    def finish(self) -> None:
        """Write the last step, and finish all checks."""
        self.log.finish()
        self.log.write()
        self.replicas.finish()


@contextmanager
def monitor(
    config: RunConfig,
    plan: RunPlan,
    pipe: Pipeline,
    run: RunDirectory,
    state: TrainState,
    group: Any,
) -> Iterator[Monitor]:
    """Observe a run in the body of ``with``.

    ``state``: the state that the run starts from.
    ``group``: a gloo group of all processes that only the main thread uses (None: one process)."""
    watch, note = RankWatch.of_run(config, plan, group)
    with watch, StepLog(config, plan, run.path, state.step, run.start, pipe.awaited) as log:
        replicas = ReplicaCheck(config.check_replicas_every, pipe, plan.shape.atoms, group)
        recorder = Recorder.of_run(config, run.path, state.step, plan.device)
        yield Monitor(log, watch, replicas, recorder, tuple(filter(None, [note])), plan.compile)
