"""The log of a run, one step behind the device.

The host must not wait for a step before it launches the next step. So ``launched`` takes a step's
results as tensors, and reads the numbers of the step before, which the device has finished by then.
``finish`` waits for the last launched step. The run calls ``finish`` where the host has to wait
anyway.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from dtron.checkpoint import TrainState
from dtron.data import Data
from dtron.errors import LostRank, UserError
from dtron.model.flops import active_count, flops_per_token, parameter_count
from dtron.model.head import loss_options
from dtron.renamed import dotted
from dtron.runtime.batches import GlobalBatch
from dtron.runtime.config import RunConfig
from dtron.runtime.exit import OTHERS_WAIT
from dtron.runtime.fault_tolerance import NonFiniteGuard, diverged, some_rank, wait_for_step
from dtron.runtime.metrics import Metrics, Throughput, mark
from dtron.runtime.rank_watch import Look
from dtron.runtime.summary import Summary
from dtron.runtime.trackers.tracked_run import TrackedRun
from dtron.runtime.trackers.tracker import About
from dtron.training.config import RunPlan
from dtron.training.lr_schedule import Rates
from dtron.training.reports import StepReports, describe_experts, describe_extras, describe_mixers
from dtron.tree import flat


class Launched(NamedTuple):
    """A step that has been launched: its results on the device, and the time mark of its end."""

    step: int
    samples: int
    loss: Tensor
    grad_norm: Tensor
    reports: StepReports
    rates: Rates
    valid: int
    terms: int
    wait_seconds: float
    end: Any


class StepLog:
    """Logs the steps of a run after step ``start``. Only the main rank writes.

    ``wait_seconds``: the seconds in which the host waited for the device, at the last step.
    ``about``: the record of this start (``RunDirectory.start``), for the trackers.
    ``awaited``: says what a step that does not end waits for, see ``wait_for_step``."""

    def __init__(
        self,
        config: RunConfig,
        plan: RunPlan,
        run_dir: Path,
        start: int,
        about: Mapping[str, Any],
        awaited: Callable[[], str] = some_rank,
    ):
        self._config, self._device, self._awaited = config, plan.device, awaited
        self.guard = NonFiniteGuard(config.max_nonfinite_steps, config.optim.skip_grad_norm)
        flops = flops_per_token(config.model, config.data.seq_len, config.lora)
        throughput = Throughput(plan.device, plan.shape.size, flops)
        tracked = _tracked(config, run_dir, start, about) if plan.main else None
        self._metrics = Metrics(run_dir, throughput, config.steps, start, plan.main, tracked)
        self._summary = Summary()
        self._stats = config.loss.objective.stats(loss_options(config.model))
        self._noted: dict[str, float] = {}  # metrics for the next record
        self.wait_seconds = 0.0
        self._done = start  # the last step that was written
        self._launched: Launched | None = None
        self._record: dict[str, Any] | None = None

    def launched(
        self,
        state: TrainState,
        batch: GlobalBatch,
        rates: Rates,
        loss: Tensor,
        grad_norm: Tensor,
        reports: StepReports,
    ) -> None:
        """Take the results of a step and the state after it, and write the step before."""
        end = mark(self._device)
        previous = self._launched
        self._launched = Launched(
            state.step,
            state.samples,
            loss,
            grad_norm,
            reports,
            rates,
            batch.valid,
            batch.terms,
            batch.wait_seconds,
            end,
        )
        if previous is not None:
            self._write(self._read(previous))

    def note(self, look: Look | None) -> None:
        """Print the warnings of a look at the ranks, and add its metrics to the next record."""
        if look is not None:
            self.say(*look.warnings)
            self._noted |= look.metrics

    def finish(self) -> None:
        """Wait for the last launched step and print its line."""
        if self._launched is not None:
            self._record, self._launched = self._read(self._launched), None

    def validation(self, losses: Mapping[str, float]) -> None:
        """Add validation losses to the finished step. Raises UserError if one is not finite."""
        assert self._record is not None  # ``finish`` has made it
        step = self._record["step"]
        if not all(map(math.isfinite, losses.values())):
            raise diverged(step, "the validation loss is not finite")
        self._record |= losses
        loss, *of_average = losses.values()
        more = "".join(f", of the average of the weights {x:.4f}" for x in of_average)
        self.say(f"step {step}: validation loss {loss:.4f}{more}")

    def tasks(self, metrics: Mapping[str, float]) -> None:
        """Add the metrics of tasks to the finished step."""
        assert self._record is not None  # ``finish`` has made it
        self._record |= metrics
        if metrics:
            text = ", ".join(
                f"{name.removeprefix('tasks.')} {x:.4f}" for name, x in metrics.items()
            )
            self.say(f"step {self._record['step']}: {text}")

    def saved_in(self, seconds: float) -> None:
        """Add the seconds for which a checkpoint after the finished step has stopped training."""
        assert self._record is not None  # ``finish`` has made it
        self._record["checkpoint_stall_seconds"] = seconds

    def write(self) -> None:
        """Write the finished step. The time since its end is not counted to the next step."""
        if self._record is not None:
            self._write(self._record)
            self._metrics.restart_clock()
            self._record = None

    def _write(self, record: dict[str, Any]) -> None:
        self._metrics.write(record)
        self._summary.note(record)
        self._done = record["step"]

    def summary(self) -> tuple[str, ...]:
        """Return lines about all steps of this process; none without a step."""
        return tuple(filter(None, [self._summary.text()]))

    def say(self, *lines: str) -> None:
        """Print lines, on the main rank."""
        for line in lines:
            self._metrics.say(line)

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            over = self._done >= self._config.steps
            self._metrics.close("finished" if over else "stopped")
        else:  # the other ranks wait for the report of this rank, or for its roll call
            shared = issubclass(kind, UserError) and not issubclass(kind, LostRank)
            self._metrics.close("failed", OTHERS_WAIT / 2 if shared else 1.0)

    def _read(self, x: Launched) -> dict[str, Any]:
        """Return the record of a step. The host waits for the step here."""
        begun = time.perf_counter()
        wait_for_step(x.end, self._config.timeout_seconds, self._awaited)
        self.wait_seconds = time.perf_counter() - begun
        loss, norm, config = x.loss.item(), x.grad_norm.item(), self._config
        if warning := self.guard.note(x.step, loss, norm):
            self.say(warning)
        record = self._metrics.step(x.step, loss, norm, x.rates.lr, x.valid, x.end, x.wait_seconds)
        record["samples"] = x.samples
        if x.rates.decay is not None:
            record["weight_decay"] = x.rates.decay * config.optim.largest_weight_decay
        record["skipped_steps"] = self.guard.skipped_steps
        record |= describe_experts(x.reports.experts, config.model)
        record |= describe_mixers(x.reports.mixers, config.model)
        record |= describe_extras(x.reports, self._stats, x.terms) | self._noted
        self._noted = {}
        if x.step % config.log_every == 0 or x.step in (1, config.steps):
            self._metrics.line(record)
        return record


def _tracked(config: RunConfig, run_dir: Path, step: int, start: Mapping[str, Any]) -> TrackedRun:
    """Open the trackers of a run."""
    name = config.track_name or run_dir.resolve().name
    values = dotted(asdict(config))
    about = About(name, config.track_project, run_dir, values, start, step)
    return TrackedRun(config.trackers, about)


def describe(config: RunConfig, plan: RunPlan, data: Data, step: int) -> str:
    """Return the first line of a run: model, mesh, dtype, data and batch."""
    ranks = _count(plan.shape.size, "rank")
    compute = str(plan.compute).removeprefix("torch.")
    size = f"{data.train.size:,} tokens" if data.train.size else "a stream"
    sizes = config.ramp.sizes
    parameters = f"{parameter_count(config.model):,} parameters"
    if config.model.moe.experts:
        parameters += f" ({active_count(config.model):,} for each token)"
    if config.lora.rank:
        trained = sum(w.numel for w in flat(config.declare()) if not (w.frozen or w.buffer))
        parameters += f", of which {'magnitudes and ' if config.lora.dora else ''}updates "
        parameters += f"with {trained:,} parameters are trained beside them"
    batch = " to ".join(map(str, dict.fromkeys((min(sizes), max(sizes)))))
    count = _count(max(plan.counts), "microbatch", "es")
    if config.ramp.ramps:
        count = f"{min(plan.counts)} to {count}"
    return (
        f"{parameters} on {plan.shape} ({ranks}, {plan.device}, {compute}, zero {config.zero}); "
        f"{size} of text; {batch} x {config.data.seq_len} tokens a step in {count}"
        + (f"; resumed at step {step}" if step else "")
    )


def _count(n: int, noun: str, ending: str = "s") -> str:
    return f"{n} {noun}{ending if n > 1 else ''}"
