"""Watches the ranks of a run: who is slow, and how healthy the GPUs are.

Every ``--watch-every`` steps each rank measures itself (probes.py, gpu_health.py), and sends what
it has measured since the look before to all ranks: one message of ``len(COLUMNS)`` numbers between
the hosts, which nobody waits for. It is read at the next look. So the host waits neither for its
device nor for another rank. Rank 0 logs what stragglers.py and gpu_health.py find.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dtron.distributed.redistribute import rank
from dtron.runtime import gpu_health
from dtron.runtime.config import RunConfig
from dtron.runtime.gpu_health import HealthSampler, health_faults, health_metrics, open_nvml
from dtron.runtime.pauses import Pauses
from dtron.runtime.probes import Probes, stride_of
from dtron.runtime.stragglers import CAUSES, Persistent, describe, slow_ranks
from dtron.training.config import RunPlan

COLUMNS = ("step", *CAUSES, "energy", *gpu_health.COLUMNS)
ENERGY = gpu_health.COLUMNS.index("energy_joules")


class Look(NamedTuple):
    """What a look at all ranks has found: warnings for the log, and metrics."""

    warnings: list[str]
    metrics: dict[str, float]


class Judge:
    """Judges what all ranks have measured, look after look.

    ``names``: of each rank, its number, host and device.
    ``stride``: the distance between two ranks that exchange a message."""

    def __init__(self, names: Sequence[str], stride: int = 1) -> None:
        self._names, self._stride = names, stride
        self._persistent = Persistent()
        self._health: list[list[float]] | None = None  # of the look before

    def note(self, step: int, tokens: int, table: Sequence[Sequence[float]]) -> Look:
        """Judge a look.

        ``step``: the step of the look.
        ``tokens``: the tokens of all ranks between the two health samples.
        ``table``: of each rank, the numbers of ``COLUMNS``."""
        columns = dict(zip(COLUMNS, map(list, zip(*table, strict=True)), strict=True))
        numbers = {cause: columns[cause] for cause in CAUSES}
        found: dict[tuple[int, str], str] = {}
        for slow in slow_ranks(columns["step"], numbers, self._stride):
            found[slow.rank, slow.cause] = f"is slow in {slow.cause}: {describe(slow)}"
        health = [list(row[-len(gpu_health.COLUMNS) :]) for row in table]
        at_once = []
        for r, (old, new) in enumerate(zip(self._health or health, health, strict=True)):
            faults = health_faults(old, new)
            if "memory" in faults:  # it does not repeat itself
                at_once.append(f"warning: step {step}: {self._names[r]}: {faults.pop('memory')}")
            found |= {(r, kind): text for kind, text in faults.items()}
        self._health = health
        due = self._persistent.note(
            {(r, kind): f"{self._names[r]} {text}" for (r, kind), text in found.items()}
        )
        metrics = health_metrics(health, columns["energy"], tokens)
        if len(table) > 1:
            for cause, values in numbers.items():
                metrics[f"ranks.{cause}_seconds.max"] = max(values)
                metrics[f"ranks.{cause}_seconds.median"] = statistics.median(values)
        return Look([*at_once, *(f"warning: step {step}: {text}" for text in due)], metrics)


class Message(NamedTuple):
    """A message between all ranks that is under way.

    ``work``: None: there is one rank.
    ``tokens``: see ``Judge.note``."""

    step: int
    tokens: int
    work: Any
    table: torch.Tensor


class RankWatch:
    """Measures this rank, and with the other ranks looks at all ranks. All ranks make the same
    calls.

    ``every``: the number of steps between two looks; 0: never.
    ``group``: a gloo group of all processes that only the main thread uses (None: one process).
    ``health``: the GPU of this rank.
    ``pauses``: of this process.
    ``clock``: returns seconds."""

    def __init__(
        self,
        every: int,
        device: str,
        group: Any = None,
        health: HealthSampler | None = None,
        pauses: Pauses | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._every, self._group, self._clock = every, group, clock
        self._on_cpu = not device.startswith("cuda")
        self._health, self._pauses = health or HealthSampler(None), pauses or Pauses()
        self._message: Message | None = None
        self._sample = self._health.newest
        self._tokens, self._tokens_of_samples = 0, 0
        self._begun, self._steps = 0.0, 0
        self._spent = [0.0] * 3  # seconds: steps, data, host
        if not every:
            return
        ranks = 1 if group is None else dist.get_world_size(group)
        stride = stride_of(ranks, int(os.environ.get("LOCAL_WORLD_SIZE", 0)))
        self._judge = Judge(_names(device, group, ranks), stride)
        self._table = torch.empty(ranks, len(COLUMNS), dtype=torch.float64)
        self._probes = Probes(device, ranks, stride)
        self._probe()  # the first matmul and message of a process take longer

    @classmethod
    def of_run(cls, config: RunConfig, plan: RunPlan, group: Any) -> tuple[RankWatch, str]:
        """Return the watch of a run, and a note for the log. ``group``: see the class. Simulated
        ranks are not watched, and neither is one process on a CPU."""
        on_cpu = not plan.device.startswith("cuda")
        if not config.watch_every or config.simulate or (group is None and on_cpu):
            return cls(0, plan.device), ""
        read, note = open_nvml(plan.device)
        pauses = Pauses()
        pauses.start()
        return cls(config.watch_every, plan.device, group, HealthSampler(read), pauses), note

    def begin(self) -> None:
        """Mark the begin of a step on the host."""
        self._begun = self._clock()

    def end(self, step: int, tokens: int, data: float, launch: float, wait: float) -> Look | None:
        """Mark the end of a step on the host. Return what the look before has found, on rank 0, if
        this step has a look.

        ``tokens``: the tokens of the step, over all ranks.
        ``data``: the seconds in which the host waited for data.
        ``launch``: the seconds in which the host launched the step. A CPU computes then.
        ``wait``: the seconds in which the host waited for the device."""
        if not self._every:
            return None
        seconds = self._clock() - self._begun
        host = seconds - data - wait - (launch if self._on_cpu else 0.0)
        # While the host waits for the device, the device has work: so much cost nothing.
        exposed = max(data - wait, 0.0), max(host - max(wait - data, 0.0), 0.0)
        self._spent = [a + b for a, b in zip(self._spent, (seconds, *exposed), strict=True)]
        self._steps, self._tokens = self._steps + 1, self._tokens + tokens
        if step % self._every:
            return None
        found = self._receive()
        self._send(step)
        self._probe()
        return found

    def _probe(self) -> None:
        self._probes.launch()
        self._health.ask()

    def _send(self, step: int) -> None:
        """Send what this rank has measured since the look before."""
        newest = self._health.newest
        energy = newest[ENERGY] - self._sample[ENERGY]
        own = [x / self._steps for x in (*self._spent, self._pauses.read())]
        numbers = torch.tensor([*own, *self._probes.read(), energy, *newest], dtype=torch.float64)
        work = None
        if self._group is None:
            self._table[0] = numbers
        else:
            work = dist.all_gather(list(self._table), numbers, group=self._group, async_op=True)
        self._message = Message(step, self._tokens_of_samples, work, self._table)
        self._sample, self._tokens_of_samples, self._tokens = newest, self._tokens, 0
        self._steps, self._spent = 0, [0.0] * 3

    def _receive(self) -> Look | None:
        """Read the message of the look before."""
        if self._message is None:
            return None
        step, tokens, work, table = self._message
        if work is not None:
            work.wait()  # the message came long ago
        self._message = None
        if rank() != 0:
            return None
        return self._judge.note(step, tokens, table.tolist())

    def __enter__(self) -> RankWatch:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self._receive()  # no group may be destroyed while a message is under way
        self._health.close()
        self._pauses.close()


def _names(device: str, group: Any, ranks: int) -> list[str]:
    """Return the number, host and device of each rank."""
    own = socket.gethostname() if device == "cpu" else f"{socket.gethostname()}, {device}"
    names: list[Any] = [own] * ranks
    if group is not None:
        dist.all_gather_object(names, own, group=group)
    return [f"rank {r} ({name})" for r, name in enumerate(names)]
