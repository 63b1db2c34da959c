"""Signals of a run: the one owner of all signal handlers.

**A request to stop.** A preempted job gets SIGTERM (torchrun, Slurm) or SIGUSR1 (Slurm's warning).
A user presses Ctrl-C. All three mean: finish the step, save a checkpoint, exit (``StopSignal``). A
signal reaches each rank at a different time, perhaps in a different step. So the ranks agree before
every step: they all-reduce one integer over gloo, the hosts' own network.

**The end of a job.** When a rank dies, torchrun sends SIGTERM to the other ranks at once. The grace
period of ``Termination`` lets these ranks report which rank is lost. ``Termination`` handles
SIGTERM in every command that torchrun has started. ``StopSignal`` takes its place while a run
trains, and gives SIGTERM back afterwards.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

from dtron.errors import LostRank

GRACE = 2.0  # seconds from SIGTERM to the end of the process
FORWARDED = 3.0  # seconds; a second SIGINT within this time is torchrun forwarding the first Ctrl-C


class Termination:
    """SIGTERM ends this process after the grace period."""

    def __init__(self) -> None:
        self._received = threading.Event()

    def install(self) -> None:
        signal.signal(signal.SIGTERM, self._end)

    def _end(self, *_: Any) -> None:
        self._received.set()
        threading.Timer(GRACE, os._exit, [143]).start()

    def wait(self, seconds: float) -> bool:
        """Wait for SIGTERM. Return whether it has come."""
        return self._received.wait(seconds)


class StopSignal:
    """``with StopSignal(group) as stop``: inside the body, signals ask the run to stop.

    ``group``: a gloo group of all processes (None: one process).
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, group: Any = None):
        self.name, self.group = "", group
        self._received_at = 0.0
        self._replaced: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # else not allowed
            self._replaced = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._replaced.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        since = time.monotonic() - self._received_at
        if self.name and number == signal.SIGINT and since > FORWARDED:
            raise KeyboardInterrupt
        if not self.name:
            self.name, self._received_at = signal.Signals(number).name, time.monotonic()

    def asked(self) -> bool:
        """Return whether any rank got a signal. Every rank calls this function, and all get the
        same answer."""
        if self.group is None:
            return bool(self.name)
        # Imported here, because commands that compute nothing import this file too.
        import torch
        import torch.distributed as dist

        own = self.SIGNALS.index(signal.Signals[self.name]) + 1 if self.name else 0
        number = torch.tensor([own])
        try:
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self.group)
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            raise LostRank(
                f"another rank has died or hangs ({why}); see the output of that rank"
            ) from error
        if number.item() and not self.name:
            self.name = self.SIGNALS[int(number.item()) - 1].name
        return bool(number.item())
