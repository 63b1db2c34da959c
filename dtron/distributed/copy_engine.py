"""Collectives that copy engines carry, so that all processors are left to matrix products.

NCCL moves data with kernels, and these take processors (SMs) from the products they are to hide
behind: under ZeRO-3 a collective is under way a quarter of the time. But an all-gather adds nothing
up, and neither does the all-to-all in which gradients are sent to where they are summed (``swap``
in distributed/collectives.py). Both are copies out of another GPU's memory, and for these a GPU has
engines of their own. So the process groups of the axes that ZeRO shards over are
``CopyEngineGroup`` (distributed/symmetric_memory.py makes them): functional collectives, DTensor
and inductor's scheduler find an ordinary group, of which these two kinds are pulled from *symmetric
memory*, memory of each rank that all of them have mapped, on streams of their own. Anything else,
and what does not fit, is NCCL's.

What still needs a processor, and so waits for one, is kept out of the way: a *barrier*, which says
that all ranks have come to it, and the copy of a rank's own part of a weight, which is a kernel.
(Its own piece of a gradient is added from where it is.)

* A weight's part lies in symmetric memory from the beginning. One barrier after the update (``settle``) says
  for all weights that they are there, and a gather needs none. Nobody says that a weight has been pulled and
  may be written again: a step has its gradients only when its weights have landed, and no rank goes on to
  write before all ranks' gradients are in the norm.
* Anything else is copied to a stage first, and a barrier says that it is there. Two halves of the stage take
  turns: who has come to the next barrier has pulled what was in the other half. All-to-alls wait for others
  to share a barrier with.
* Weights that lie there do not queue behind what is staged: each has a stream (``CopyStream``).
* What is asked for together is waited for together (training/zero3_prefetch.py).

Left out: reductions in flight (NVLink's switches could add; multicast is off on many machines),
groups over several hosts, and more than one engine at a time.

A process group written in Python, and all that torch has for it that is private, is this file's
alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

STAGE = (
    2**27
)  # bytes of symmetric memory, twice, for what is not there yet; what is larger goes by NCCL
MANY = 2**26  # bytes to exchange, for which a barrier is little
ALIGNED = 256  # bytes


class SymmetricBuffer(Protocol):
    """Symmetric memory, as torch gives it."""

    def get_buffer(
        self, rank: int, sizes: Sequence[int], dtype: torch.dtype, storage_offset: int
    ) -> Tensor:
        """A part of the memory of any rank, mapped here."""

    def barrier(self, channel: int = 0, timeout_ms: int = 0) -> None:
        """In the stream: until all ranks' streams have come here."""


class CopyWork(dist.Work):
    """Copies under way. What they read and write must live until then."""

    def __init__(self, waits: Sequence[Callable[[], Any]], keeps: Any):
        super().__init__()
        self._waits, self._keeps = waits, keeps

    def wait(self, timeout: timedelta | None = None) -> bool:
        for wait in self._waits:
            wait()
        self._keeps = None
        return True


class CopyStream:
    """A stream of copies beside the one that computes. In a CUDA graph a wait costs about as much
    as a small kernel, so one is made to do for several copies: a wait is for all that had been
    asked for when the last one was, which is a product's time ago, and those that it covers are
    none."""

    def __init__(self, device: str):
        self._device, self._stream = device, None
        self._last, self._before = (
            (-1, None),
            (-1, None),
        )  # the last copy, and that when one was waited for
        self._covered: dict[torch.cuda.Stream, int] = {}  # by who waits

    def do(self, copy: Callable[[], None]) -> Callable[[], None]:
        """Copies after all that is asked for so far; gives how to wait for the end of it."""
        if self._device != "cuda":
            copy()
            return lambda: None
        if self._stream is None:
            self._stream = torch.cuda.Stream(priority=-1)
        done = torch.cuda.Event()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            copy()
            done.record()
        self._last = mine = (self._last[0] + 1, done)
        return lambda: self._wait(mine)

    def _wait(self, mine: tuple[int, Any]) -> None:
        here = torch.cuda.current_stream()
        if mine[0] > self._covered.get(here, -1):
            self._covered[here], done = max(mine, self._before, key=lambda copy: copy[0])
            here.wait_event(done)
        self._before = self._last


@dataclass
class PendingAllToAll:
    """An all-to-all that has not begun, or how to wait for it."""

    out: Tensor
    x: Tensor
    wait: Callable[[], None] | None = None


class CopyEngineGroup(dist.ProcessGroup):
    """A group whose all-gathers, and all-to-alls of a row for each other rank, are copies.
    ``allocate(bytes)`` gives memory that ``meet(memory)``, called by all ranks, makes a Room of;
    ``rest`` is the backend for anything else."""

    def __init__(
        self,
        rest: Any,
        rank: int,
        size: int,
        device: str,
        allocate: Callable[[int], Tensor],
        meet: Callable[[Tensor], SymmetricBuffer],
        timeout: timedelta,
    ):
        super().__init__(rank, size)
        kind = {
            "cuda": dist.ProcessGroup.BackendType.NCCL,
            "cpu": dist.ProcessGroup.BackendType.GLOO,
        }[device]
        self._register_backend(torch.device(device), kind, rest)
        self._rest, self._rank, self._size, self._device = rest, rank, size, device
        self._allocate, self._meet = allocate, meet
        self._patience = int(timeout.total_seconds() * 1000)
        self._stage: tuple[Tensor, SymmetricBuffer] | None = None
        self._near: tuple[Tensor, SymmetricBuffer] | None = None
        self._staged = 0  # since all ranks last agreed
        self._unsent: list[PendingAllToAll] = []
        self._beside = {name: CopyStream(device) for name in ("weights", "staged")}

    def getBackendName(self) -> str:
        return "copies"

    def meet(self, memory: Tensor) -> None:
        """From now on what lies in here is pulled from where it is. All ranks must call this."""
        self._near = memory, self._meet(memory)
        self.settle()

    def settle(self) -> None:
        """What lies in memory that all have met at has its values for others to pull. All ranks
        must call this when they have written there, and when what they asked for until now has
        landed."""
        self._send()
        if met := self._near or self._stage:
            met[1].barrier(timeout_ms=self._patience)
        self._staged = 0

    def allgather_into_tensor_coalesced(
        self, outs: list[Tensor], xs: list[Tensor], opts: Any = None
    ):
        goes = lambda x: self._fits(x) or (x.is_contiguous() and self._at(x) is not None)
        if not all(goes(x) and y.is_contiguous() for x, y in zip(xs, outs, strict=True)):
            works = [self._rest._allgather_base(y, x) for x, y in zip(xs, outs, strict=True)]
            return CopyWork([w.wait for w in works], (outs, xs))
        return self._copied(self._gather(outs, xs), outs, xs)

    def _allgather_base(self, out: Tensor, x: Tensor, opts: Any = None):
        return self.allgather_into_tensor_coalesced([out], [x])

    def alltoall_base(
        self, out: Tensor, x: Tensor, received: Any = None, sent: Any = None, opts: Any = None
    ):
        # Only what ``swap`` asks for, a row for each other rank. All must decide alike, and rows of
        # experts are as many as they happen to be, on each rank: these have two dims, and swap's
        # have more.
        received, sent = list(received or []), list(sent or [])
        one_each = (
            received == sent == [int(i != self._rank) for i in range(self._size)] and x.dim() > 2
        )
        if not (one_each and self._fits(x) and out.is_contiguous()):
            return self._rest.alltoall_base(out, x, received, sent)
        return self._later(out, x)

    # What follows is the backend's. A method that is not here would find its way there by itself,
    # but holding Python's lock, for which a thread of the backend may be waiting with a lock of its
    # own: seen to hang.

    def allgather(self, outs: Any, xs: list[Tensor], opts: Any):
        return self._rest.allgather(outs, xs, opts)

    def allreduce(self, xs: list[Tensor], opts: Any):
        return self._rest.allreduce(xs, opts)

    def allreduce_coalesced(self, xs: list[Tensor], opts: Any):
        return self._rest.allreduce_coalesced(xs, opts)

    def barrier(self, opts: Any):
        return self._rest.barrier(opts)

    def broadcast(self, xs: list[Tensor], opts: Any):
        return self._rest.broadcast(xs, opts)

    def reduce_scatter(self, outs: list[Tensor], xs: Any, opts: Any):
        return self._rest.reduce_scatter(outs, xs, opts)

    def reduce_scatter_tensor_coalesced(self, outs: list[Tensor], xs: list[Tensor], opts: Any):
        works = [self._rest._reduce_scatter_base(y, x, opts) for x, y in zip(xs, outs, strict=True)]
        return CopyWork([w.wait for w in works], (outs, xs))

    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced  # its name in torch 2.13

    def send(self, xs: list[Tensor], to: int, tag: int):
        return self._rest.send(xs, to, tag)

    def recv(self, xs: list[Tensor], of: int, tag: int):
        return self._rest.recv(xs, of, tag)

    def _fits(self, x: Tensor) -> bool:
        """Whether x can be staged."""
        return x.is_contiguous() and 0 < x.nbytes <= STAGE

    def _at(self, x: Tensor) -> int | None:
        """Where x lies in the memory that all have met at."""
        if self._near is None:
            return None
        at = x.data_ptr() - self._near[0].data_ptr()
        return at if 0 <= at < self._near[0].nbytes else None

    def _copied(self, wait: Callable[[], None], *keeps: Any) -> CopyWork:
        return CopyWork([wait], keeps)

    def _gather(self, outs: list[Tensor], xs: list[Tensor]) -> Callable[[], None]:
        self._send()
        begins = [self._at(x) for x in xs]

        def copy() -> None:
            for out, x, at in zip(outs, xs, begins, strict=True):
                room, begin = (self._near[1], at) if at is not None else self._put([(0, x)])
                rows = out.view(self._size, -1)
                for peer in self._others():
                    self._pull(rows[peer], room, peer, begin)
                rows[self._rank].copy_(x.view(-1))

        return self._beside["staged" if None in begins else "weights"].do(copy)

    def _later(self, out: Tensor, x: Tensor) -> CopyWork:
        """An all-to-all that may wait for some more, with which it shares a barrier: until somebody
        waits for one, or gathers something, or they are many."""
        if sum(room_for(asked.x) for asked in self._unsent) + room_for(x) > STAGE:
            self._send()
        self._unsent.append(asked := PendingAllToAll(out, x))
        if sum(room_for(asked.x) for asked in self._unsent) >= MANY:
            self._send()

        def wait() -> None:
            if asked.wait is None:
                self._send()
            asked.wait()

        return self._copied(wait, out, x)

    def _send(self) -> None:
        together, self._unsent = self._unsent, []
        if together:
            wait = self._beside["staged"].do(
                lambda: self._swap([(asked.out, asked.x) for asked in together])
            )
            for asked in together:
                asked.wait = wait

    def _swap(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        begins = list(accumulate((room_for(x) for _, x in pairs), initial=0))
        room, begin = self._put([(at, x) for at, (_, x) in zip(begins, pairs, strict=False)])
        for at, (out, x) in zip(begins, pairs, strict=False):
            rows, size = out.view(self._size - 1, -1), x[0].nbytes
            for peer in self._others():  # it has no row for itself, and no rank has one
                mine = begin + at + (self._rank - (self._rank > peer)) * size
                self._pull(rows[peer - (peer > self._rank)], room, peer, mine)

    def _others(self) -> list[int]:
        """Each rank begins with another."""
        return [(self._rank + step) % self._size for step in range(1, self._size)]

    def _pull(self, row: Tensor, room: SymmetricBuffer, peer: int, at: int) -> None:
        """From where it lies there, in bytes."""
        row.copy_(room.get_buffer(peer, row.shape, row.dtype, at // row.itemsize))

    def _put(self, parts: list[tuple[int, Tensor]]) -> tuple[SymmetricBuffer, int]:
        """These parts on the stage, each at its place after where the half begins (all in
        bytes)."""
        if self._stage is None:
            memory = self._allocate(2 * STAGE)
            self._stage = memory, self._meet(memory)
        memory, room = self._stage
        if (
            self._staged == 0
        ):  # a recording begins here, and may follow upon itself or upon anything
            room.barrier(timeout_ms=self._patience)
        begin = self._staged % 2 * STAGE
        self._staged += 1
        for at, x in parts:
            memory[begin + at : begin + at + x.nbytes].view(x.dtype).copy_(x.view(-1))
        room.barrier(timeout_ms=self._patience)
        return room, begin


def room_for(x: Tensor) -> int:
    """What x takes of memory in which others follow, in bytes: they are to begin where any dtype
    may."""
    return -(-x.nbytes // ALIGNED) * ALIGNED
