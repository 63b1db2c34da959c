"""Side streams for copies. A copy is issued to a side stream, and another stream waits for the copy
later.

Inside a CUDA graph each event wait costs about as much as a small kernel. So one wait covers
several copies: it waits for the newest copy that had been issued by the time of the previous wait,
about one matmul earlier. Waits for copies that are already covered are skipped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class CopyWork(dist.Work):
    """Copies in progress.

    ``waits``: functions that wait for the copies.
    ``tensors``: the tensors that the copies read and write. They must stay alive until ``wait``."""

    def __init__(self, waits: Sequence[Callable[[], Any]], tensors: Any):
        super().__init__()
        self._waits, self._tensors = waits, tensors

    def wait(self, timeout: timedelta | None = None) -> bool:
        for wait in self._waits:
            wait()
        self._tensors = None
        return True


class IssuedCopy(NamedTuple):
    """A copy in a side stream.

    ``number``: copies are numbered in the order in which they are issued.
    ``event``: the end of the copy; None: no copy has been issued."""

    number: int
    event: torch.cuda.Event | None


def nothing_to_wait_for() -> None:
    """Wait for a copy that has ended already."""


class CopyStream:
    """A side stream for copies."""

    def __init__(self, device: str):
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._newest = self._newest_at_last_wait = IssuedCopy(-1, None)
        self._covered: dict[torch.cuda.Stream, int] = {}  # waiting stream: newest covered copy

    def do(self, copy: Callable[[], None]) -> Callable[[], None]:
        """Run ``copy`` in this stream, after all work issued so far in the current stream. Return a
        function: the stream that is current when it is called waits for the end of the copy."""
        if self._device != "cuda":
            copy()
            return nothing_to_wait_for
        if self._stream is None:
            self._stream = torch.cuda.Stream(priority=-1)
        end = torch.cuda.Event()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            copy()
            end.record()
        self._newest = IssuedCopy(self._newest.number + 1, end)
        return partial(self._wait, self._newest)

    def _wait(self, copy: IssuedCopy) -> None:
        stream = torch.cuda.current_stream()
        if copy.number > self._covered.get(stream, -1):
            covered = max(copy, self._newest_at_last_wait, key=attrgetter("number"))
            self._covered[stream] = covered.number
            assert covered.event is not None  # at least ``copy`` has been issued
            stream.wait_event(covered.event)
        self._newest_at_last_wait = self._newest
