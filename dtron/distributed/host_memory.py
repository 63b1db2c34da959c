"""Host memory for tensors that leave the device for a while.

A copy between a GPU and the host overlaps with computation only if the host's buffer is pinned and
the copy has a stream of its own. Pinning a buffer takes milliseconds, and is not allowed while a
CUDA graph is recorded. So buffers are kept and used again. All are made in the first steps, which
run unrecorded, because every step of a kind needs the same number of buffers.

All copies are ordered by the stream that computes. A copy to the host begins after all work issued
so far. A buffer is given back only after the computing stream waits for the copy out of this
buffer. So a buffer is never written before it was read, and no event outlives a step: a recording
may not wait for an event from before it.

On a CPU the buffers are plain memory, and copies run at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

from torch import Tensor

from dtron.distributed.copy_stream import CopyStream
from dtron.torch_compile import planned


class HostMemory:
    """Buffers in host memory, and the streams to and from the host.

    ``allocated``: bytes of all buffers."""

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = {}
        self._streams: dict[str, tuple[CopyStream, CopyStream]] = {}
        self.allocated = 0

    def take(self, x: Tensor) -> Tensor:
        """Return a buffer that nobody uses, for these bytes."""
        size = buffer_size(x.nbytes)
        free = self._free.setdefault(size, [])
        if free:
            return free.pop()
        self.allocated += size
        return empty_on_host(x, size)

    def give_back(self, buffer: Tensor) -> None:
        """Take a buffer back. The current stream must have waited for all copies out of it."""
        self._free[buffer.nbytes].append(buffer)

    def copy_out(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
        """Start copies to host buffers, after all work issued so far. Return a function: the
        current stream waits for the end of the copies. The tensors must live until then.

        ``pairs``: a tensor of bytes on the device, and its buffer."""
        return self._stream(pairs[0][0], 0).do(lambda: _copy(pairs))

    def copy_in(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
        """Start copies from host buffers, as ``copy_out`` does in the other direction."""
        return self._stream(pairs[0][0], 1).do(lambda: _copy([(b, x) for x, b in pairs]))

    def _stream(self, x: Tensor, way: int) -> CopyStream:
        kind = x.device.type
        if kind not in self._streams:
            self._streams[kind] = CopyStream(kind), CopyStream(kind)
        return self._streams[kind][way]


def empty_on_host(x: Tensor, *size: int) -> Tensor:
    """Return a tensor in host memory, of the dtype of x. It is pinned if x is on a GPU."""
    plan = planned()
    with nullcontext() if plan is None else plan.on_host():
        return x.new_empty(size, device="cpu", pin_memory=x.device.type == "cuda")


def buffer_size(nbytes: int) -> int:
    """Return the size of the buffer for so many bytes: at most a quarter more. Sizes that vary from
    step to step, as the rows of an expert do, then need few buffers."""
    unit = 1 << max(0, nbytes.bit_length() - 3)
    return -(-nbytes // unit) * unit


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for source, target in pairs:
        n = min(source.nbytes, target.nbytes)
        target[:n].copy_(source[:n], non_blocking=True)
