"""The next batches are read while the device works on this one.

A thread, not processes: reading is copying out of mapped memory, which takes milliseconds, and a
thread shares that memory. It runs at most ``depth`` batches ahead. What it makes is still a pure
function of the sample's number, so nothing of it has to be saved: a resumed run starts another
thread at its own number.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """``make(n)`` for each of ``numbers``, in their order. ``waited`` is how many seconds the last
    ``next`` took: what an error in ``make`` raises is raised there, and StopIteration after the
    last number."""

    def __init__(self, make: Callable[[int], T], numbers: Iterable[int], depth: int = 2) -> None:
        self.waited = 0.0
        self._found: SimpleQueue = SimpleQueue()
        self._room = threading.Semaphore(depth)
        stop = threading.Event()
        self._thread = threading.Thread(
            target=_work,
            args=(make, numbers, self._found, self._room, stop),
            name="data",
            daemon=True,
        )
        self._end = weakref.finalize(self, _end, stop, self._room)
        self._thread.start()

    def next(self) -> T:
        start = time.perf_counter()
        value, error = self._found.get()
        self.waited = time.perf_counter() - start
        if error is not None:
            self._found.put((None, error))  # for whoever asks again
            raise error
        self._room.release()
        return value

    def close(self) -> None:
        """Let the thread end, once it has made what it is at."""
        self._end()


def _work(
    make, numbers: Iterable[int], found: SimpleQueue, room: threading.Semaphore, stop
) -> None:
    try:
        for number in numbers:
            room.acquire()
            if stop.is_set():
                return
            found.put((make(number), None))
        raise StopIteration
    except BaseException as error:  # whatever it is, it belongs to the one who waits
        found.put((None, error))


def _end(stop: threading.Event, room: threading.Semaphore) -> None:
    stop.set()
    room.release()
