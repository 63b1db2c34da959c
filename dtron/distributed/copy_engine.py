"""Collectives carried by a GPU's copy engines, so that all SMs are left to matmuls.

NCCL moves data with kernels. These kernels occupy SMs, and so slow down the matmuls that should
hide the communication. Under ZeRO-3 a collective is running a quarter of the time. But two
collectives of ZeRO-3 compute nothing, they only copy out of another GPU's memory: the all-gather of
weights, and the all-to-all that sends each summand of a gradient to the rank that sums it
(``exchange_rows`` in distributed/collectives.py). A GPU has separate engines for copies.

So the process groups of the axes that ZeRO shards over are ``CopyEngineGroup`` (created by
distributed/symmetric_memory.py). Functional collectives, DTensor and inductor's scheduler see an
ordinary process group. For these two collectives the group pulls data from *symmetric memory*, on
side streams (distributed/copy_stream.py). Symmetric memory is memory of each rank that all ranks
have mapped. All other collectives go through NCCL, and so do tensors that do not fit.

Two operations still need an SM, and so wait until an SM is free. The first is a *barrier*, which
ends when all ranks have reached it. The second is the copy of a rank's own shard of a weight, which
is a kernel. Both are kept out of the way. (A rank's own row of a gradient is added without a copy.)

* A weight's shard is in symmetric memory from the start. One barrier after the optimizer's update
  (``publish``) announces all weights, so their all-gathers need no barrier. No barrier announces
  that a shard has been pulled and may be overwritten. None is needed: a step has its gradients only
  after its weights have arrived, and no rank overwrites weights before the gradients of all ranks
  are in the gradient norm.
* Any other tensor is first copied to a staging buffer, and a barrier announces it. The two halves
  of the staging buffer alternate: a rank that has reached the next barrier has pulled everything
  from the other half. All-to-alls are delayed, so that several all-to-alls share one barrier.
* Weights in symmetric memory do not queue behind staged tensors: weights and staged tensors each
  have a ``CopyStream``.
* Collectives that are issued together are waited for together (training/zero3_prefetch.py).

Left out: reductions in the network (NVLink's switches could sum; multicast is off on many
machines), groups over several hosts, and more than one copy engine at a time.

Only this file implements a process group in Python and uses torch's private API for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dtron.distributed.copy_stream import CopyStream, CopyWork

STAGING_BYTES = 2**27  # of each half of the staging buffer; larger tensors go through NCCL
DELAYED_BYTES = 2**26  # of delayed all-to-alls; above, a barrier is cheap compared with the copies
ALIGNMENT = 256  # bytes; alignment of each tensor in symmetric memory


class SymmetricBuffer(Protocol):
    """Symmetric memory: the methods of torch's handle that are called here."""

    def get_buffer(
        self, rank: int, sizes: Sequence[int], dtype: torch.dtype, storage_offset: int
    ) -> Tensor:
        """Return a view of any rank's memory, mapped into this process."""

    def barrier(self, channel: int = 0, timeout_ms: int = 0) -> None:
        """Make the current stream wait until the streams of all ranks have reached this barrier."""


@dataclass
class PendingAllToAll:
    """An all-to-all with input ``x`` and output ``out``.

    ``wait``: waits for the end of the all-to-all; None: the all-to-all has not been issued yet."""

    out: Tensor
    x: Tensor
    wait: Callable[[], None] | None = None


class CopyEngineGroup(dist.ProcessGroup):
    """A process group that does two collectives by copies: all-gathers, and all-to-alls with one
    row for each other rank.

    ``nccl``: the backend for all other collectives.
    ``allocate``: allocates a number of bytes of memory for ``rendezvous``.
    ``rendezvous``: makes a SymmetricBuffer of this memory; all ranks must call it.
    """

    def __init__(
        self,
        nccl: Any,
        rank: int,
        size: int,
        device: str,
        allocate: Callable[[int], Tensor],
        rendezvous: Callable[[Tensor], SymmetricBuffer],
        timeout: timedelta,
    ):
        super().__init__(rank, size)  # type: ignore[call-arg]  # the stub lacks this constructor
        kinds = dist.ProcessGroup.BackendType
        kind = {"cuda": kinds.NCCL, "cpu": kinds.GLOO}[device]
        self._register_backend(torch.device(device), kind, nccl)
        self._nccl, self._rank, self._size = nccl, rank, size
        self.allocate, self._rendezvous = allocate, rendezvous
        self._timeout_ms = int(timeout.total_seconds() * 1000)
        self._staging: tuple[Tensor, SymmetricBuffer] | None = None
        self._registered: tuple[Tensor, SymmetricBuffer] | None = None
        self._stagings = 0  # calls of _put_in_staging since the last ``publish``
        self._delayed: list[PendingAllToAll] = []
        self._streams = {name: CopyStream(device) for name in ("weights", "staged")}

    def getBackendName(self) -> str:
        return "copies"

    def register(self, memory: Tensor) -> None:
        """Register memory: from now on tensors in this memory are pulled without staging. All ranks
        must call this."""
        self._registered = memory, self._rendezvous(memory)
        self.publish()

    def publish(self) -> None:
        """Announce that the tensors in registered memory have been written and may be pulled. This
        is a barrier: all ranks must call it after their writes, and after the end of all
        collectives issued so far."""
        self._issue_delayed()
        if memory := self._registered or self._staging:
            memory[1].barrier(timeout_ms=self._timeout_ms)
        self._stagings = 0

    def allgather_into_tensor_coalesced(
        self, outs: list[Tensor], xs: list[Tensor], opts: Any = None
    ) -> Any:
        if all(self._can_pull(x) and y.is_contiguous() for x, y in zip(xs, outs, strict=True)):
            return self._work(self._issue_all_gather(outs, xs), outs, xs)
        works = [self._nccl._allgather_base(y, x) for x, y in zip(xs, outs, strict=True)]
        return CopyWork([w.wait for w in works], (outs, xs))

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
        row_each = [int(i != self._rank) for i in range(self._size)]
        exchanges_rows = received == sent == row_each and x.dim() > 2
        if exchanges_rows and self._fits_staging(x) and out.is_contiguous():
            return self._delay(out, x)
        return self._nccl.alltoall_base(out, x, received, sent)

    # The methods below forward to NCCL. A method that is missing here would be forwarded too, but
    # with Python's GIL held. A thread of NCCL may hold a lock of its own and wait for the GIL. This
    # deadlock was seen.

    def allgather(self, outs: Any, xs: Any, opts: Any = None) -> Any:
        return self._nccl.allgather(outs, xs, opts)

    def allreduce(self, *args: Any, **options: Any) -> Any:
        return self._nccl.allreduce(*args, **options)

    def allreduce_coalesced(self, xs: Any, opts: Any = None) -> Any:
        return self._nccl.allreduce_coalesced(xs, opts)

    def barrier(self, opts: Any = None) -> Any:
        return self._nccl.barrier(opts)

    def broadcast(self, *args: Any, **options: Any) -> Any:
        return self._nccl.broadcast(*args, **options)

    def reduce_scatter(self, *args: Any, **options: Any) -> Any:
        return self._nccl.reduce_scatter(*args, **options)

    def reduce_scatter_tensor_coalesced(self, outs: Any, xs: Any, opts: Any = None) -> Any:
        works = [self._nccl._reduce_scatter_base(y, x, opts) for x, y in zip(xs, outs, strict=True)]
        return CopyWork([w.wait for w in works], (outs, xs))

    reduce_scatter_single_coalesced: Any = reduce_scatter_tensor_coalesced  # its name in torch 2.13

    def send(self, xs: list[Tensor], destination: int, tag: int) -> Any:
        return self._nccl.send(xs, destination, tag)

    def recv(self, xs: list[Tensor], source: int, tag: int) -> Any:
        return self._nccl.recv(xs, source, tag)

    def _fits_staging(self, x: Tensor) -> bool:
        """Whether x is contiguous and fits into half of the staging buffer."""
        return x.is_contiguous() and 0 < x.nbytes <= STAGING_BYTES

    def _registered_offset(self, x: Tensor) -> int | None:
        """Return the offset of x in registered memory, in bytes; None: x is not there."""
        if self._registered is None:
            return None
        memory = self._registered[0]
        offset = x.data_ptr() - memory.data_ptr()
        return offset if 0 <= offset < memory.nbytes else None

    def _can_pull(self, x: Tensor) -> bool:
        """Whether other ranks can pull x: from the staging buffer or from registered memory."""
        registered = x.is_contiguous() and self._registered_offset(x) is not None
        return registered or self._fits_staging(x)

    def _work(self, wait: Callable[[], None], *tensors: Any) -> CopyWork:
        return CopyWork([wait], tensors)

    def _issue_all_gather(self, outs: list[Tensor], xs: list[Tensor]) -> Callable[[], None]:
        self._issue_delayed()
        offsets, registered = [self._registered_offset(x) for x in xs], self._registered

        def copy() -> None:
            for out, x, offset in zip(outs, xs, offsets, strict=True):
                if offset is None or registered is None:
                    buffer, begin = self._put_in_staging([(0, x)])
                else:
                    buffer, begin = registered[1], offset
                rows = out.view(self._size, -1)
                for peer in self._pull_order():
                    self._pull(rows[peer], buffer, peer, begin)
                rows[self._rank].copy_(x.view(-1))

        return self._streams["staged" if None in offsets else "weights"].do(copy)

    def _delay(self, out: Tensor, x: Tensor) -> CopyWork:
        """Delay an all-to-all, so that it shares a barrier with later all-to-alls. All delayed
        all-to-alls are issued when one of them is waited for, when anything is all-gathered, or
        when together they have many bytes (``DELAYED_BYTES``)."""
        if self._delayed_bytes() + aligned_bytes(x) > STAGING_BYTES:
            self._issue_delayed()
        pending = PendingAllToAll(out, x)
        self._delayed.append(pending)
        if self._delayed_bytes() >= DELAYED_BYTES:
            self._issue_delayed()

        def wait() -> None:
            if pending.wait is None:
                self._issue_delayed()
            assert pending.wait is not None
            pending.wait()

        return self._work(wait, out, x)

    def _delayed_bytes(self) -> int:
        return sum(aligned_bytes(pending.x) for pending in self._delayed)

    def _issue_delayed(self) -> None:
        issued, self._delayed = self._delayed, []
        if issued:
            pairs = [(pending.out, pending.x) for pending in issued]
            wait = self._streams["staged"].do(partial(self._exchange_rows, pairs))
            for pending in issued:
                pending.wait = wait

    def _exchange_rows(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Do all-to-alls, given as ``(output, input)``, behind one barrier."""
        *offsets, _ = accumulate((aligned_bytes(x) for _, x in pairs), initial=0)
        staged = [(offset, x) for offset, (_, x) in zip(offsets, pairs, strict=True)]
        buffer, begin = self._put_in_staging(staged)
        for offset, (out, x) in zip(offsets, pairs, strict=True):
            rows, row_bytes = out.view(self._size - 1, -1), x[0].nbytes
            for peer in self._pull_order():  # no rank sends a row to itself
                row = self._rank - (self._rank > peer)  # the peer's row for this rank
                at = begin + offset + row * row_bytes
                self._pull(rows[peer - (peer > self._rank)], buffer, peer, at)

    def _pull_order(self) -> list[int]:
        """Return the other ranks. Each rank begins with a different peer."""
        return [(self._rank + step) % self._size for step in range(1, self._size)]

    def _pull(self, row: Tensor, buffer: SymmetricBuffer, peer: int, at: int) -> None:
        """Copy a row out of the memory of ``peer``.

        ``at``: the offset of the row in this memory, in bytes."""
        row.copy_(buffer.get_buffer(peer, row.shape, row.dtype, at // row.itemsize))

    def _put_in_staging(self, parts: list[tuple[int, Tensor]]) -> tuple[SymmetricBuffer, int]:
        """Copy tensors to the next half of the staging buffer, each to its given offset in this
        half. Return the buffer and the offset of the half. All offsets are in bytes."""
        if self._staging is None:
            memory = self.allocate(2 * STAGING_BYTES)
            self._staging = memory, self._rendezvous(memory)
        memory, buffer = self._staging
        # A CUDA graph begins here. Its replay may follow another replay, or any other work.
        if self._stagings == 0:
            buffer.barrier(timeout_ms=self._timeout_ms)
        begin = self._stagings % 2 * STAGING_BYTES
        self._stagings += 1
        for offset, x in parts:
            start = begin + offset
            memory[start : start + x.nbytes].view(x.dtype).copy_(x.view(-1))
        buffer.barrier(timeout_ms=self._timeout_ms)
        return buffer, begin


def aligned_bytes(x: Tensor) -> int:
    """Return the bytes that x takes in memory shared with other tensors. They are rounded up, so
    that the next tensor begins at an offset that is valid for any dtype."""
    return -(-x.nbytes // ALIGNMENT) * ALIGNMENT
