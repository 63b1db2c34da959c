"""Collectives carried by a GPU's copy engines, so that all SMs are left to matmuls.

NCCL moves data with kernels. These kernels occupy SMs, and so slow down the matmuls that should
hide the communication. Under ZeRO-3 a collective is running a quarter of the time. But an
all-gather sums nothing. Neither does the all-to-all that sends gradients to the ranks that sum them
(``exchange_rows`` in distributed/collectives.py). Both only copy out of another GPU's memory, and a
GPU has separate engines for copies. So the process groups of the axes that ZeRO shards over are
``CopyEngineGroup`` (created by distributed/symmetric_memory.py). Functional collectives, DTensor
and inductor's scheduler see an ordinary process group. For these two collectives the group pulls
data from *symmetric memory*, on side streams. Symmetric memory is memory of each rank that all
ranks have mapped. All other collectives, and tensors that do not fit, go through NCCL.

Two operations still need an SM, and so wait until one is free. One is a *barrier*, which ends when
all ranks have reached it. The other is the copy of a rank's own shard of a weight, which is a
kernel. Both are kept out of the way. (A rank's own row of a gradient is added without a copy.)

* A weight's shard is in symmetric memory from the start. One barrier after the optimizer's update
  (``settle``) announces all weights, so their all-gathers need no barrier. No barrier announces
  that a shard has been pulled and may be overwritten. None is needed: a step has its gradients only
  after its weights have arrived, and no rank overwrites weights before the gradients of all ranks
  are in the gradient norm.
* Any other tensor is first copied to a staging buffer, and a barrier announces it. The two halves
  of the staging buffer alternate: a rank that has reached the next barrier has pulled everything
  from the other half. All-to-alls are delayed, so that several of them share one barrier.
* Weights in symmetric memory do not queue behind staged tensors: both have their own stream
  (``CopyStream``).
* Collectives that are issued together are waited for together (training/zero3_prefetch.py).

Left out: reductions in the network (NVLink's switches could sum; multicast is off on many
machines), groups over several hosts, and more than one copy engine at a time.

Only this file implements a process group in Python and uses torch's private API for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

STAGE = 2**27  # bytes of each half of the staging buffer; larger tensors go through NCCL
MANY = 2**26  # bytes of delayed all-to-alls; from here on a barrier is cheap in comparison
ALIGNED = 256  # bytes; alignment of each tensor in symmetric memory


class SymmetricBuffer(Protocol):
    """Symmetric memory: the methods of torch's handle that are used here."""

    def get_buffer(
        self, rank: int, sizes: Sequence[int], dtype: torch.dtype, storage_offset: int
    ) -> Tensor:
        """Return a view of any rank's memory, mapped into this process."""

    def barrier(self, channel: int = 0, timeout_ms: int = 0) -> None:
        """Make the current stream wait until the streams of all ranks have reached this barrier."""


class CopyWork(dist.Work):
    """Copies in progress. ``keeps`` holds the tensors that the copies read and write: these tensors
    must stay alive until ``wait``."""

    def __init__(self, waits: Sequence[Callable[[], Any]], keeps: Any):
        super().__init__()
        self._waits, self._keeps = waits, keeps

    def wait(self, timeout: timedelta | None = None) -> bool:
        for wait in self._waits:
            wait()
        self._keeps = None
        return True


class CopyStream:
    """A side stream for copies. Inside a CUDA graph each event wait costs about as much as a small
    kernel. So one wait covers several copies: it waits for the newest copy that had been issued by
    the time of the previous wait, about one matmul earlier. Waits for copies that are already
    covered are skipped."""

    def __init__(self, device: str):
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        # Each is (number, event): the newest copy, and the newest copy as of the previous wait.
        self._last: tuple[int, Any] = (-1, None)
        self._before: tuple[int, Any] = (-1, None)
        self._covered: dict[torch.cuda.Stream, int] = {}  # waiting stream: newest covered copy

    def do(self, copy: Callable[[], None]) -> Callable[[], None]:
        """Run ``copy`` in this stream, after all work issued so far in the current stream. Return a
        function: the stream that is current when it is called waits for the end of the copy."""
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
    """An all-to-all. ``wait`` is None until it has been issued; then ``wait`` waits for its end."""

    out: Tensor
    x: Tensor
    wait: Callable[[], None] | None = None


class CopyEngineGroup(dist.ProcessGroup):
    """A process group that does two collectives by copies: all-gathers, and all-to-alls with one
    row for each other rank.

    ``rest``: the backend for all other collectives.
    ``allocate``: allocates a number of bytes of memory for ``meet``.
    ``meet``: makes a SymmetricBuffer of this memory; all ranks must call it.
    """

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
        super().__init__(rank, size)  # type: ignore[call-arg]  # the stub lacks this constructor
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
        self._staged = 0  # calls of _put since the last ``settle``
        self._unsent: list[PendingAllToAll] = []
        self._beside = {name: CopyStream(device) for name in ("weights", "staged")}

    def getBackendName(self) -> str:
        return "copies"

    def meet(self, memory: Tensor) -> None:
        """Register memory: from now on tensors in this memory are pulled without staging. All ranks
        must call this."""
        self._near = memory, self._meet(memory)
        self.settle()

    def settle(self) -> None:
        """Announce that the tensors in the memory registered by ``meet`` have been written and may
        be pulled. All ranks must call this after they have written there, and after all collectives
        issued so far have completed."""
        self._send()
        if met := self._near or self._stage:
            met[1].barrier(timeout_ms=self._patience)
        self._staged = 0

    def allgather_into_tensor_coalesced(
        self, outs: list[Tensor], xs: list[Tensor], opts: Any = None
    ) -> Any:
        goes = lambda x: self._fits(x) or (x.is_contiguous() and self._at(x) is not None)
        if not all(goes(x) and y.is_contiguous() for x, y in zip(xs, outs, strict=True)):
            works = [self._rest._allgather_base(y, x) for x, y in zip(xs, outs, strict=True)]
            return CopyWork([w.wait for w in works], (outs, xs))
        return self._copied(self._gather(outs, xs), outs, xs)

    def _allgather_base(self, out: Tensor, x: Tensor, opts: Any = None) -> Any:
        return self.allgather_into_tensor_coalesced([out], [x])

    def alltoall_base(
        self, out: Tensor, x: Tensor, received: Any = None, sent: Any = None, opts: Any = None
    ) -> Any:
        # Only the all-to-alls of ``exchange_rows`` are done by copies: one row for each other rank.
        # All ranks must decide alike. The splits of an expert all-to-all depend on the routing, so
        # on some ranks they may look the same by chance. But expert tensors have two dims, and
        # tensors of ``exchange_rows`` have more.
        received, sent = list(received or []), list(sent or [])
        one_each = (
            received == sent == [int(i != self._rank) for i in range(self._size)] and x.dim() > 2
        )
        if not (one_each and self._fits(x) and out.is_contiguous()):
            return self._rest.alltoall_base(out, x, received, sent)
        return self._later(out, x)

    # The methods below forward to the backend. A method that is missing here would be forwarded
    # too, but with Python's GIL held. A thread of the backend may hold a lock of its own and wait
    # for the GIL. This deadlock was seen.

    def allgather(self, outs: Any, xs: Any, opts: Any = None) -> Any:
        return self._rest.allgather(outs, xs, opts)

    def allreduce(self, *args: Any, **options: Any) -> Any:
        return self._rest.allreduce(*args, **options)

    def allreduce_coalesced(self, xs: Any, opts: Any = None) -> Any:
        return self._rest.allreduce_coalesced(xs, opts)

    def barrier(self, opts: Any = None) -> Any:
        return self._rest.barrier(opts)

    def broadcast(self, *args: Any, **options: Any) -> Any:
        return self._rest.broadcast(*args, **options)

    def reduce_scatter(self, *args: Any, **options: Any) -> Any:
        return self._rest.reduce_scatter(*args, **options)

    def reduce_scatter_tensor_coalesced(self, outs: Any, xs: Any, opts: Any = None) -> Any:
        works = [self._rest._reduce_scatter_base(y, x, opts) for x, y in zip(xs, outs, strict=True)]
        return CopyWork([w.wait for w in works], (outs, xs))

    reduce_scatter_single_coalesced: Any = reduce_scatter_tensor_coalesced  # its name in torch 2.13

    def send(self, xs: list[Tensor], to: int, tag: int) -> Any:
        return self._rest.send(xs, to, tag)

    def recv(self, xs: list[Tensor], of: int, tag: int) -> Any:
        return self._rest.recv(xs, of, tag)

    def _fits(self, x: Tensor) -> bool:
        """Whether x can be staged: it is contiguous and fits into half of the staging buffer."""
        return x.is_contiguous() and 0 < x.nbytes <= STAGE

    def _at(self, x: Tensor) -> int | None:
        """Return the offset of x in the memory registered by ``meet``, in bytes, or None."""
        if self._near is None:
            return None
        at = x.data_ptr() - self._near[0].data_ptr()
        return at if 0 <= at < self._near[0].nbytes else None

    def _copied(self, wait: Callable[[], None], *keeps: Any) -> CopyWork:
        return CopyWork([wait], keeps)

    def _gather(self, outs: list[Tensor], xs: list[Tensor]) -> Callable[[], None]:
        self._send()
        begins, near = [self._at(x) for x in xs], self._near

        def copy() -> None:
            for out, x, at in zip(outs, xs, begins, strict=True):
                room, begin = (near[1], at) if near and at is not None else self._put([(0, x)])
                rows = out.view(self._size, -1)
                for peer in self._others():
                    self._pull(rows[peer], room, peer, begin)
                rows[self._rank].copy_(x.view(-1))

        return self._beside["staged" if None in begins else "weights"].do(copy)

    def _later(self, out: Tensor, x: Tensor) -> CopyWork:
        """Delay an all-to-all, so that it shares a barrier with later ones. All delayed all-to-alls
        are issued when one of them is waited for, when anything is all-gathered, or when together
        they have many bytes (``MANY``)."""
        if sum(room_for(asked.x) for asked in self._unsent) + room_for(x) > STAGE:
            self._send()
        self._unsent.append(asked := PendingAllToAll(out, x))
        if sum(room_for(asked.x) for asked in self._unsent) >= MANY:
            self._send()

        def wait() -> None:
            if asked.wait is None:
                self._send()
            assert asked.wait is not None
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
            for peer in self._others():  # no rank sends a row to itself
                mine = begin + at + (self._rank - (self._rank > peer)) * size
                self._pull(rows[peer - (peer > self._rank)], room, peer, mine)

    def _others(self) -> list[int]:
        """Return the other ranks in pull order. Each rank begins with a different peer."""
        return [(self._rank + step) % self._size for step in range(1, self._size)]

    def _pull(self, row: Tensor, room: SymmetricBuffer, peer: int, at: int) -> None:
        """Copy a row out of the memory of ``peer``. ``at``: its offset there, in bytes."""
        row.copy_(room.get_buffer(peer, row.shape, row.dtype, at // row.itemsize))

    def _put(self, parts: list[tuple[int, Tensor]]) -> tuple[SymmetricBuffer, int]:
        """Copy tensors to the next half of the staging buffer, each to its given offset in this
        half. Return the buffer and the offset of the half. All offsets are in bytes."""
        if self._stage is None:
            memory = self._allocate(2 * STAGE)
            self._stage = memory, self._meet(memory)
        memory, room = self._stage
        # A CUDA graph begins here. Its replay may follow another replay, or any other work.
        if self._staged == 0:
            room.barrier(timeout_ms=self._patience)
        begin = self._staged % 2 * STAGE
        self._staged += 1
        for at, x in parts:
            memory[begin + at : begin + at + x.nbytes].view(x.dtype).copy_(x.view(-1))
        room.barrier(timeout_ms=self._patience)
        return room, begin


def room_for(x: Tensor) -> int:
    """Return the bytes that x takes in memory shared with other tensors. They are rounded up, so
    that the next tensor begins at an offset that is valid for any dtype."""
    return -(-x.nbytes // ALIGNED) * ALIGNED
