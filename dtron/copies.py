"""Collectives that copy engines carry, so that all processors are left to matrix products.

NCCL moves data with kernels, and these take processors (SMs) from the products they are to hide behind: under
ZeRO-3 a collective is under way a quarter of the time. But an all-gather adds nothing up, and neither does
the all-to-all in which gradients are sent to where they are summed (dtensor.py, ``_land``). Both are copies
out of another GPU's memory, and for these a GPU has engines of their own. So the process groups of the axes
that ZeRO shards over are ``Copies`` (reach.py makes them): functional collectives, DTensor and inductor's
scheduler find an ordinary group, of which these two kinds are pulled from *symmetric memory*, memory of each
rank that all of them have mapped, on streams of their own. Anything else, and what does not fit, is NCCL's.

What still needs a processor, and so waits for one, is kept out of the way: a *barrier*, which says that all
ranks have come to it, and the copy of a rank's own part, which is a kernel.

* A weight's part lies in symmetric memory from the beginning. One barrier after the update (``settle``) says
  for all weights that they are there, and a gather needs none. Nobody says that a weight has been pulled and
  may be written again: a step has its gradients only when its weights have landed, and no rank goes on to
  write before all ranks' gradients are in the norm.
* Anything else is copied to a stage first, and a barrier says that it is there. Two halves of the stage take
  turns: who has come to the next barrier has pulled what was in the other half.
* Weights do not queue behind what is staged: each has a stream (``Beside``).

Left out: reductions in flight (NVLink's switches could add; multicast is off on many machines), groups over
several hosts, and more than one engine at a time.

A process group written in Python, and all that torch has for it that is private, is this file's alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

STAGE = 2**27  # bytes of symmetric memory, twice, for what is not there yet; what is larger goes by NCCL


class Room(Protocol):
    """Symmetric memory, as torch gives it."""

    def get_buffer(self, rank: int, sizes: Sequence[int], dtype: torch.dtype, storage_offset: int) -> Tensor:
        """A part of the memory of any rank, mapped here."""

    def barrier(self, channel: int = 0, timeout_ms: int = 0) -> None:
        """In the stream: until all ranks' streams have come here."""


class Landed(dist.Work):
    """Copies under way. What they read and write must live until then."""

    def __init__(self, waits: Sequence[Callable[[], Any]], keeps: Any):
        super().__init__()
        self._waits, self._keeps = waits, keeps

    def wait(self, timeout: timedelta | None = None) -> bool:
        for wait in self._waits:
            wait()
        self._keeps = None
        return True


class Beside:
    """A stream of copies beside the one that computes. In a CUDA graph a wait costs about as much as a small
    kernel, so one is made to do for several copies: a wait is for all that had been asked for when the last
    one was, which is a product's time ago, and those that it covers are none."""

    def __init__(self, device: str):
        self._device, self._stream = device, None
        self._last, self._before = (-1, None), (-1, None)  # the last copy, and that when one was waited for
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


class Copies(dist.ProcessGroup):
    """A group whose all-gathers and even all-to-alls are copies. ``allocate(bytes)`` gives memory that
    ``meet(memory)``, called by all ranks, makes a Room of; ``rest`` is the backend for anything else."""

    def __init__(
        self, rest: Any, rank: int, size: int, device: str, allocate: Callable[[int], Tensor],
        meet: Callable[[Tensor], Room], timeout: timedelta,
    ):  # fmt: skip
        super().__init__(rank, size)
        kind = {"cuda": dist.ProcessGroup.BackendType.NCCL, "cpu": dist.ProcessGroup.BackendType.GLOO}[device]
        self._register_backend(torch.device(device), kind, rest)
        self._rest, self._rank, self._size, self._device = rest, rank, size, device
        self._allocate, self._meet = allocate, meet
        self._patience = int(timeout.total_seconds() * 1000)
        self._stage: tuple[Tensor, Room] | None = None
        self._near: tuple[Tensor, Room] | None = None
        self._staged = 0  # since all ranks last agreed
        self._beside = {name: Beside(device) for name in ("weights", "staged")}

    def getBackendName(self) -> str:
        return "copies"

    def meet(self, memory: Tensor) -> None:
        """From now on what lies in here is pulled from where it is. All ranks must call this."""
        self._near = memory, self._meet(memory)
        self.settle()

    def settle(self) -> None:
        """What lies in memory that all have met at has its values for others to pull. All ranks must call
        this when they have written there, and when what they asked for until now has landed."""
        if met := self._near or self._stage:
            met[1].barrier(timeout_ms=self._patience)
        self._staged = 0

    def allgather_into_tensor_coalesced(self, outs: list[Tensor], xs: list[Tensor], opts: Any = None):
        goes = lambda x: self._fits(x) or (x.is_contiguous() and self._at(x) is not None)
        if not all(goes(x) and y.is_contiguous() for x, y in zip(xs, outs, strict=True)):
            works = [self._rest._allgather_base(y, x) for x, y in zip(xs, outs, strict=True)]
            return Landed([w.wait for w in works], (outs, xs))
        return self._copied(self._gather, outs, xs)

    def _allgather_base(self, out: Tensor, x: Tensor, opts: Any = None):
        return self.allgather_into_tensor_coalesced([out], [x])

    def alltoall_base(self, out: Tensor, x: Tensor, received: Any = None, sent: Any = None, opts: Any = None):
        received, sent = list(received or []), list(sent or [])
        even = len({*received}) <= 1 and len({*sent}) <= 1 and out.shape == x.shape
        if not (even and x.shape[0] % self._size == 0 and self._fits(x) and out.is_contiguous()):
            return self._rest.alltoall_base(out, x, received, sent)
        return self._copied(self._swap, [out], [x])

    # What follows is the backend's. A method that is not here would find its way there by itself, but holding
    # Python's lock, for which a thread of the backend may be waiting with a lock of its own: seen to hang.

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
        return Landed([w.wait for w in works], (outs, xs))

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

    def _copied(self, copy: Callable[..., Callable], outs: list[Tensor], xs: list[Tensor]) -> Landed:
        waits = [copy(y.view(self._size, -1), x.view(-1)) for y, x in zip(outs, xs, strict=True)]
        return Landed(waits, (outs, xs))

    def _gather(self, rows: Tensor, x: Tensor) -> Callable[[], None]:
        at = self._at(x)

        def copy() -> None:
            room, begins = (self._near[1], at // x.itemsize) if at is not None else self._put([(0, x)])
            self._pull(rows, x, room, begins)

        return self._beside["staged" if at is None else "weights"].do(copy)

    def _swap(self, rows: Tensor, x: Tensor) -> Callable[[], None]:
        parts = x.view(self._size, -1)
        n = parts.shape[1]

        def copy() -> None:
            room, begins = self._put([(i * n, parts[i]) for i in range(self._size) if i != self._rank])
            self._pull(rows, parts[self._rank], room, begins + self._rank * n)

        return self._beside["staged"].do(copy)

    def _pull(self, rows: Tensor, own: Tensor, room: Room, at: int) -> None:
        """Each other rank's row, from where it lies there (in elements), and a rank's own."""
        for step in range(1, self._size):  # each rank begins with another
            peer = (self._rank + step) % self._size
            rows[peer].copy_(room.get_buffer(peer, rows.shape[1:], rows.dtype, at))
        rows[self._rank].copy_(own)

    def _put(self, parts: list[tuple[int, Tensor]]) -> tuple[Room, int]:
        """These parts on the stage, each at its place after where the half begins (all in elements)."""
        if self._stage is None:
            memory = self._allocate(2 * STAGE)
            self._stage = memory, self._meet(memory)
        memory, room = self._stage
        if self._staged == 0:  # a recording begins here, and may follow upon itself or upon anything
            room.barrier(timeout_ms=self._patience)
        begins = self._staged % 2 * STAGE // parts[0][1].itemsize
        self._staged += 1
        for at, x in parts:
            memory.view(x.dtype)[begins + at : begins + at + x.numel()].copy_(x)
        room.barrier(timeout_ms=self._patience)
        return room, begins
