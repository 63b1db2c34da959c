"""Signals of a run: the one owner of all signal handlers.

**A request to stop.** A preempted job gets SIGTERM (torchrun, Slurm) or SIGUSR1 (Slurm's warning).
A closed terminal sends SIGHUP. A user presses Ctrl-C. All four mean: finish the step, save a
checkpoint, exit (``StopSignal``). A signal reaches each rank at a different time, perhaps in a
different step. So the ranks agree before every step: they all-reduce one integer over gloo, the
hosts' own network. The end of torchrun is one more request (runtime/launcher.py).

**The end of a job.** When a rank dies, torchrun sends SIGTERM to the other ranks at once. The grace
period of ``Termination`` lets these ranks report which rank is lost. ``Termination`` handles
SIGTERM in every command that torchrun has started. ``StopSignal`` takes its place while a run
trains, and gives SIGTERM back afterwards. A run that got SIGTERM before, while it prepared its
data, stops before its first step.

**Ctrl-C during the imports**, which take seconds: ``stop_at_once`` ends the process.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from typing import Any

from dtron.errors import LostRank
from dtron.runtime import launcher
from dtron.runtime.output import complain

GRACE = 3.0  # seconds from SIGTERM to the end of the process
FORWARDED = 3.0  # seconds; a second SIGINT within this time is torchrun forwarding the first Ctrl-C
LAUNCHER = "the end of torchrun"


def stop_at_once() -> None:
    """Let Ctrl-C end this process with one line, until ``run_cli`` begins. KeyboardInterrupt is no
    choice here: a library that is being imported may catch it, or turn it into an ImportError."""
    starter = os.getpid()

    def end(*_: Any) -> None:
        if os.getpid() == starter and os.environ.get("RANK", "0") == "0":
            complain("stopped")
        os._exit(130)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else SIGINT is ignored
        signal.signal(signal.SIGINT, end)


def allow_interrupts() -> None:
    """Undo ``stop_at_once``: Ctrl-C raises KeyboardInterrupt."""
    if getattr(signal.getsignal(signal.SIGINT), "__module__", "") == __name__:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Termination:
    """SIGTERM ends this process after the grace period."""

    def __init__(self) -> None:
        self._received = threading.Event()

    def install(self) -> None:
        global _termination
        _termination = self
        signal.signal(signal.SIGTERM, self._end)

    def _end(self, *_: Any) -> None:
        self._received.set()
        threading.Timer(GRACE, os._exit, [143]).start()

    def wait(self, seconds: float) -> bool:
        """Wait for SIGTERM. Return whether it has come."""
        return self._received.wait(seconds)


_termination: Termination | None = None  # of this process; None: torchrun has not started it


class StopSignal:
    """``with StopSignal(group) as stop``: inside the body, signals ask the run to stop.

    ``group``: a gloo group of all processes (None: one process).
    ``name``: the signal, or ``LAUNCHER``; empty: nothing has asked the run to stop.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    REASONS = (*(number.name for number in SIGNALS), LAUNCHER)

    def __init__(self, group: Any = None):
        self.name, self.group = "", group
        self._received_at = 0.0
        self._replaced: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # else not allowed
            for number in self.SIGNALS:
                # ``nohup`` lets a program ignore SIGHUP, so that it outlives its terminal.
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._replaced[number] = signal.signal(number, self._note)
        if _termination is not None and _termination.wait(0):
            self._note(signal.SIGTERM, None)
        return self

    def __exit__(self, *_: Any) -> None:
        self.training_is_over()
        for number, handler in self._replaced.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        since = time.monotonic() - self._received_at
        if self.name and number == signal.SIGINT and since > FORWARDED:
            raise KeyboardInterrupt
        if not self.name:
            self.name, self._received_at = signal.Signals(number).name, time.monotonic()

    def asked(self) -> bool:
        """Return whether any rank was asked to stop. Every rank calls this function before each
        step, and all get the same answer."""
        if launcher.watch is not None and launcher.watch.gone() and not self.name:
            self.name = LAUNCHER
        if self.group is None:
            return bool(self.name)
        # Imported here, because commands that compute nothing import this file too.
        import torch
        import torch.distributed as dist

        own = self.REASONS.index(self.name) + 1 if self.name else 0
        number = torch.tensor([own])
        try:
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self.group)
        except RuntimeError as error:
            why = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0])  # a line of gloo's source
            raise LostRank(
                f"another rank has died or hangs ({why}); see the output of that rank"
            ) from error
        if number.item() and not self.name:
            self.name = self.REASONS[int(number.item()) - 1]
        return bool(number.item())

    @property
    def exit_code(self) -> int:
        """The exit code of the run: 0, also of a run that was asked to stop. A run that stopped
        because a torchrun has ended is not over: the other torchruns start it again on the nodes
        that are left (--max-restarts)."""
        return 1 if self.name == LAUNCHER else 0

    def training_is_over(self) -> None:
        """Note that no step follows."""
        if launcher.watch is not None:
            launcher.watch.training_is_over()
