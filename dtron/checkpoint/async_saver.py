"""Save asynchronously: training stops only for a copy, and a thread does the rest.

    copy      each rank copies the shards that it writes (shards.py) into host memory, into the same
              buffers each time. With a GPU the memory is pinned, so the copy has the full speed of
              the bus
    write     each rank writes one safetensors file, in a thread
    check     each rank computes the checksum of its file: read back from a disk, or summed up
              during an upload
    finish    rank 0 lists files and tensors in ``meta.json``, and deletes checkpoints that need not
              be kept

A save that fails (a full disk, a deleted folder) fails on all ranks. Nothing else is lost: the last
good checkpoint stays, and ``drain_messages`` returns the reason. A save waits for the previous
save.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dtron.checkpoint import files
from dtron.checkpoint.meta import FORMAT, FileMeta, Meta, TensorMeta
from dtron.checkpoint.shards import Shard, merged, shards_to_write, write_shards
from dtron.checkpoint.slow_writes import Write, slow_writes
from dtron.checkpoint.storage import AnyPath, storage_of
from dtron.distributed.redistribute import rank
from dtron.distributed.simulated_ranks import paused
from dtron.errors import LostRank, UserError


class AsyncSaver:
    """Saves checkpoints in a thread. ``save`` copies and returns; the thread writes.

    ``place``: the run's directory, or a place in an object store (see files.py).
    ``group``: a gloo group of all processes that nothing else uses (None: one process).
    ``keep``, ``keep_every``: see ``files.prune``.
    ``failed``: why the last save failed, or None."""

    def __init__(self, place: AnyPath, group: Any = None, keep: int = 0, keep_every: int = 0):
        self._place, self._group, self._keep, self._keep_every = place, group, keep, keep_every
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._messages: list[str] = []
        self.failed: str | None = None
        self._last_step = -1  # the last step that was requested

    def prepare(self, tensors: dict[str, Tensor]) -> None:
        """Allocate the buffers early, in the thread: pinning memory takes longer than copying into
        it."""
        with paused():
            shards = shards_to_write(tensors)
        self._start(partial(self._allocate, shards))

    def save(self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> float:
        """Start to save and return the seconds that this call took. Every rank calls this."""
        start = time.perf_counter()
        if step == self._last_step:
            return 0.0
        self.wait()
        self._last_step = step
        with paused(), torch.no_grad():
            copies = self._copies(shards_to_write(tensors))
        self._start(partial(self._write, step, copies, meta))
        return time.perf_counter() - start

    def wait(self) -> None:
        """Wait until no save is running."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def drain_messages(self) -> list[str]:
        """Return the messages about finished and failed saves since the last call."""
        messages, self._messages = self._messages, []
        return messages

    def __enter__(self) -> AsyncSaver:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        """Let the last save end, also if all ranks stop with the same UserError. After any other
        error, other ranks may never come to their part of the save, so nothing waits for it."""
        if error is None:
            self.close()
        elif isinstance(error, UserError) and not isinstance(error, LostRank):
            self.wait()

    def close(self) -> None:
        """Wait until no save is running. Raises UserError if the last save failed."""
        self.wait()
        if self.failed is not None:
            raise UserError(self.failed)

    def _start(self, fn: Callable[[], None]) -> None:
        # With several processes the thread is a daemon: a process that fails must not wait here for
        # the others, because the others may be waiting for this process.
        self._thread = threading.Thread(target=fn, name="save", daemon=self._group is not None)
        self._thread.start()

    def _allocate(self, shards: dict[str, Shard]) -> None:
        for name, shard in shards.items():
            if name not in self._buffers:
                x = shard.local
                self._buffers[name] = torch.empty_like(
                    x, device="cpu", pin_memory=x.is_cuda, memory_format=torch.contiguous_format
                )

    def _copies(self, shards: dict[str, Shard]) -> dict[str, Shard]:
        self._allocate(shards)
        for name, shard in shards.items():
            self._buffers[name].copy_(shard.local, non_blocking=True)
        if any(shard.local.is_cuda for shard in shards.values()):
            torch.cuda.synchronize()
        return {name: s._replace(local=self._buffers[name]) for name, s in shards.items()}

    def _write(self, step: int, copies: dict[str, Shard], meta: dict[str, Any]) -> None:
        goal, storage = files.target(self._place, step), storage_of(self._place)
        part = storage.part(goal)
        file = part / storage.file_name(rank())
        try:
            self._on_all_ranks(partial(self._begin, part))
            written = self._on_all_ranks(partial(self._write_file, file, copies))
            listed = {name: entry for name, entry, *_ in written}
            tensors = merged([described for _, _, described, _ in written])
            whole = Meta(format=FORMAT, step=step, files=listed, tensors=tensors, **meta)
            self._on_all_ranks(partial(self._finish, part, goal, whole))
            self.failed = None
            self._messages.append(f"saved {goal}")
            for line in slow_writes([write for *_, write in written], goal.parent):
                self._messages.append(f"warning: {goal.name}: {line}")
        except _Failed as failure:
            self.failed = f"{goal}: cannot write the checkpoint ({failure}); {storage.remedy}"
            self._messages.append(f"warning: {self.failed}; training goes on")
            storage.discard(part, file)

    def _begin(self, part: AnyPath) -> None:
        if rank() == 0:
            storage_of(part).begin(part)

    def _write_file(
        self, file: AnyPath, copies: dict[str, Shard]
    ) -> tuple[str, FileMeta, dict[str, TensorMeta], Write]:
        start = time.perf_counter()
        entry, described = write_shards(file, copies)
        seconds = time.perf_counter() - start
        return file.name, entry, described, Write(socket.gethostname(), entry.size, seconds)

    def _finish(self, part: AnyPath, goal: AnyPath, meta: Meta) -> None:
        if rank() == 0:
            storage_of(part).finish(part, goal, meta)
            files.prune(self._place, meta.step, self._keep, self._keep_every)

    def _on_all_ranks(self, fn: Callable[[], Any]) -> list[Any]:
        """Run ``fn`` on every rank and return all results. A failure on one rank is a failure on
        all ranks."""
        value = problem = None
        try:
            value = fn()
        except (OSError, RuntimeError, UserError) as error:
            problem = reason(error, self._place)
        outcomes: list[Any] = [(value, problem)]
        if self._group is not None:
            outcomes = [None] * dist.get_world_size(self._group)
            try:
                dist.all_gather_object(outcomes, (value, problem), group=self._group)
            except RuntimeError as error:  # another rank has ended: the main thread will notice too
                raise _Failed(str(error).splitlines()[0]) from error
        problem = next((p for _, p in outcomes if p is not None), None)
        if problem is not None:
            raise _Failed(problem)
        return [v for v, _ in outcomes]


class _Failed(Exception):
    pass


def reason(error: BaseException, place: AnyPath) -> str:
    """Return in one line why a file could not be written there."""
    if storage_of(place).is_full(place):
        return "No space left on device"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().splitlines()[-1]
