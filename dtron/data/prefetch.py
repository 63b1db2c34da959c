"""Reads the next batches in a thread while the device works on the current batch.

A thread suffices: reading a batch copies from mapped memory, which takes milliseconds, and a thread
shares this memory. The thread reads at most ``depth`` batches ahead. A batch is a pure function of
its first sample's number, so a checkpoint stores no state of the thread. A resumed run starts a
thread at its own number.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

N = TypeVar("N")
T = TypeVar("T")


class Prefetch(Generic[N, T]):
    """Calls ``make(n)`` for each of ``numbers`` in a thread; ``next`` returns the results in order.

    ``depth``: the maximum number of results that are ready.
    ``waited``: the seconds that the last ``next`` took.

    An error in ``make`` is raised by ``next``. After the last number, ``next`` raises
    StopIteration."""

    def __init__(self, make: Callable[[N], T], numbers: Iterable[N], depth: int = 2) -> None:
        self.waited = 0.0
        self._results: SimpleQueue = SimpleQueue()
        self._room = threading.Semaphore(depth)
        stop = threading.Event()
        self._thread = threading.Thread(
            target=_work,
            args=(make, numbers, self._results, self._room, stop),
            name="data",
            daemon=True,
        )
        self._end = weakref.finalize(self, _end, stop, self._room)
        self._thread.start()

    def next(self) -> T:
        """Return the next result. Waits until it is ready."""
        start = time.perf_counter()
        value, error = self._results.get()
        self.waited = time.perf_counter() - start
        if error is not None:
            self._results.put((None, error))  # the next call raises it again
            raise error
        self._room.release()
        return value

    def close(self) -> None:
        """Let the thread end after its current result."""
        self._end()


def _work(
    make: Callable[[N], Any],
    numbers: Iterable[N],
    results: SimpleQueue,
    room: threading.Semaphore,
    stop: threading.Event,
) -> None:
    try:
        for number in numbers:
            room.acquire()
            if stop.is_set():
                return
            results.put((make(number), None))
        raise StopIteration
    except BaseException as error:  # of any kind: ``next`` raises it
        results.put((None, error))


def _end(stop: threading.Event, room: threading.Semaphore) -> None:
    stop.set()
    room.release()
