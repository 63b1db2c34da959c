"""Save asynchronously: training stops only for a copy, and a thread does the rest.

    copy      each rank copies the shards that it writes (shards.py) into host memory, into the same
              buffers each time. With a GPU the memory is pinned, so the copy has the full speed of
              the bus
    write     each rank writes one safetensors file, in a thread
    check     each rank reads its file back and computes the checksum
    finish    rank 0 lists files and tensors in ``meta.json``, renames the folder, and deletes
              checkpoints that need not be kept

A save that fails (a full disk, a deleted folder) fails on all ranks. Nothing else is lost: the last
good checkpoint stays, and ``drain_messages`` returns the reason. A save waits for the previous
save.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dtron.checkpoint import files
from dtron.checkpoint.meta import FORMAT, Meta
from dtron.checkpoint.shards import Shard, merged, shards_to_write, write_shards
from dtron.distributed.redistribute import rank
from dtron.distributed.simulated_ranks import paused
from dtron.errors import LostRank, UserError


class AsyncSaver:
    """Saves checkpoints in a thread. ``save`` copies and returns; the thread writes.

    ``group``: a gloo group of all processes that nothing else uses (None: one process).
    ``keep``, ``keep_every``: see ``files.prune``.
    ``failed``: why the last save failed, or None."""

    def __init__(self, run_dir: Path, group: Any = None, keep: int = 0, keep_every: int = 0):
        self._run_dir, self._group, self._keep, self._keep_every = run_dir, group, keep, keep_every
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
        goal = files.target(self._run_dir, step)
        part = goal.with_name(goal.name + ".part")
        file = part / f"rank-{rank():05d}.safetensors"
        try:
            self._on_all_ranks(partial(_make_empty, part))
            tensors = merged(self._on_all_ranks(partial(write_shards, file, copies)))
            described = self._on_all_ranks(partial(files.describe_files, [file]))
            listed = {name: entry for each in described for name, entry in each.items()}
            whole = Meta(format=FORMAT, step=step, files=listed, tensors=tensors, **meta)
            self._on_all_ranks(partial(self._finish, part, goal, whole))
            self.failed = None
            self._messages.append(f"saved {goal}")
        except _Failed as failure:
            remedy = "free space, or choose another --run-dir"
            self.failed = f"{goal}: cannot write the checkpoint ({failure}); {remedy}"
            self._messages.append(f"warning: {self.failed}; training goes on")
            if rank() == 0:
                shutil.rmtree(part, ignore_errors=True)

    def _finish(self, part: Path, goal: Path, meta: Meta) -> None:
        if rank() == 0:
            files.finish(part, goal, meta)
            files.prune(self._run_dir, meta.step, self._keep, self._keep_every)

    def _on_all_ranks(self, fn: Callable[[], Any]) -> list[Any]:
        """Run ``fn`` on every rank and return all results. A failure on one rank is a failure on
        all ranks."""
        value = problem = None
        try:
            value = fn()
        except (OSError, RuntimeError, UserError) as error:
            problem = reason(error, self._run_dir)
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


def reason(error: BaseException, folder: Path) -> str:
    """Return in one line why a file in ``folder`` could not be written."""
    with suppress(OSError):
        if shutil.disk_usage(folder).free < 1 << 20:
            return "No space left on device"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().splitlines()[-1]


def _make_empty(folder: Path) -> None:
    if rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
