"""Probes of a rank's device and of its links: how long a small fixed piece of work takes.

A step's own matmuls and messages cannot be timed apart: a recorded step is one launch, and a rank
that waits in a collective looks busy. A probe is launched between two steps. Its time marks are
read much later, so the host does not wait.

    compute         a matmul, without any other rank
    communication   a message to the rank ``stride`` after this rank, and one from the rank
                    ``stride`` before it. An all-reduce before it lets all ranks begin together

With as many ranks on each host, ``stride`` is the number of ranks of a host: then every message
crosses the network between hosts, by the network card of its rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from dtron.runtime.metrics import elapsed, mark

REPEATS = 3  # of which the fastest counts: another program may run for a moment
MESSAGE = 1 << 18  # float32 numbers, which is 1 MiB


class Probes:
    """The probes of one rank.

    ``ranks``: the number of ranks that are processes.
    ``stride``: the distance to the rank that gets the message."""

    def __init__(self, device: str, ranks: int, stride: int) -> None:
        gpu = device.startswith("cuda")
        size, dtype = (2048, torch.bfloat16) if gpu else (128, torch.float32)
        self._device, self._ranks = device, ranks
        self._x = torch.ones(size, size, dtype=dtype, device=device)
        self._y = torch.empty_like(self._x)
        self._marks: list[list[Any]] = []
        if ranks > 1:
            rank = dist.get_rank()
            self._sent, self._received = torch.zeros(2, MESSAGE, device=device)
            self._out, self._in = [0] * ranks, [0] * ranks
            self._out[(rank + stride) % ranks] = self._in[(rank - stride) % ranks] = MESSAGE
            self._one = torch.zeros(1, device=device)

    def launch(self) -> None:
        """Launch the probes. All ranks call this after the same step."""
        compute = [mark(self._device)]
        for _ in range(REPEATS):
            torch.mm(self._x, self._x, out=self._y)
            compute.append(mark(self._device))
        self._marks = [compute]
        if self._ranks > 1:
            dist.all_reduce(self._one)
            exchange = [mark(self._device)]
            for _ in range(REPEATS):
                dist.all_to_all_single(self._received, self._sent, self._in, self._out)
                exchange.append(mark(self._device))
            self._marks.append(exchange)

    def read(self) -> tuple[float, float]:
        """Return the seconds of a matmul and of a message at the last launch; NaN: not measured.
        A step after the launch must be over."""
        found = [
            min(elapsed(a, b) for a, b in zip(marks, marks[1:], strict=False))
            for marks in self._marks
        ]
        compute, exchange = [*found, *[float("nan")] * 2][:2]
        return compute, exchange


def stride_of(ranks: int, on_host: int) -> int:
    """Return the distance between ranks that exchange a message.

    ``on_host``: the number of ranks on each host."""
    return on_host if on_host and ranks > on_host and ranks % on_host == 0 else 1
