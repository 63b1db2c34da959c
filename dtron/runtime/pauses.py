"""Measures for how long this process stands still.

A process stands still while it is stopped (SIGSTOP, a debugger, a frozen container), while other
programs have its CPU cores, and while its memory comes back from swap. Its own clocks do not tell:
on a CPU the time is lost inside a step, in which this rank also waits for the others.

A thread wakes every ``PERIOD`` seconds. If it is late, this process has not run for so long. The
other threads of the process hold Python's lock for a few milliseconds at most, so a thread that is
later than ``TOLERANCE`` has not waited for them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

PERIOD, TOLERANCE = 0.02, 0.03  # seconds


class Pauses:
    """Counts the seconds in which this process stood still. The thread starts with ``start``.

    ``clock``: returns seconds.
    ``wait``: waits for so many seconds; returns whether the watch is over."""

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        self._over = threading.Event()
        self._clock, self._wait = clock, wait or self._over.wait
        self._seconds = self._read = 0.0

    def start(self) -> None:
        threading.Thread(target=self.run, name="pauses", daemon=True).start()

    def run(self) -> None:
        """Count until the watch is over. This is the thread."""
        before = self._clock()
        while not self._wait(PERIOD):
            now = self._clock()
            late = now - before - PERIOD
            if late > TOLERANCE:
                self._seconds += late
            before = now

    def read(self) -> float:
        """Return the seconds since the last call."""
        seconds, before = self._seconds, self._read
        self._read = seconds
        return seconds - before

    def close(self) -> None:
        """Let the thread end."""
        self._over.set()
