"""Copies of the last state in the memory of hosts: a lost rank costs seconds, and not the steps
since the last checkpoint.

The idea is that of Gemini (Wang et al. 2023, "Fast Failure Recovery in Distributed Training with
In-Memory Checkpoints", SOSP): memory is fast enough for a copy every few steps, and a second copy
on another host survives the loss of a host. When a rank dies, torchrun starts all ranks again, and
the memory of the old processes is gone. A file in a tmpfs, as /dev/shm, is memory too, and it
survives.

    copy     each rank copies its own tensors into host memory. Training stops only for that
    write    a thread writes them to a file in the folder of its host
    send     the thread sends the file to the rank of the same place on the next host, which writes
             it too
    agree    when all ranks are done, older steps are deleted

A copy is no checkpoint. It has the tensors of one rank as they are, so only the same mesh, model
and optimizer can read it. The file begins with a line of JSON: step, place in the data, checksum
and ``key``, which stands for everything that must be the same.

On a new start the ranks compare the files of all hosts, and take the newest step of which every
rank's file is there and has its checksum. A rank whose host lacks its file gets it from another
host. So one host may be lost, or several that are not neighbours.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dtron.checkpoint.copy_files import (
    CHUNK,
    NAME,
    Head,
    Held,
    check_room,
    holders,
    octets,
    read,
    read_head,
    whole,
    write,
)
from dtron.checkpoint.state import TrainState
from dtron.distributed.redistribute import rank, to_local
from dtron.errors import UserError
from dtron.tree import with_specs

KEPT = 2  # steps: one is whole while the next one is written


def tensors(state: TrainState, spec: Any) -> list[Tensor]:
    """Return this rank's tensors of the trained weights and of the optimizer's state."""
    trees = (state.params, *state.opt.trees.values())
    return [to_local(x) for tree in trees for w, x in with_specs(spec, tree) if not w.frozen]


def buffer_of(x: Tensor) -> Tensor:
    """Make a tensor on the host for the values of ``x``. If ``x`` is on a GPU, it is pinned: then
    the copy has the full speed of the bus."""
    pinned, plain = x.is_cuda, torch.contiguous_format
    return torch.empty_like(x, device="cpu", pin_memory=pinned, memory_format=plain)


class MemoryCopies:
    """Writes and reads the copies of a run. All ranks make the same calls.

    ``folder``: where the files of this host are.
    ``every``: the number of steps between two copies; 0: none are made or read.
    ``key``: stands for the run, its mesh and its optimizer.
    ``spec``: the declared tree.
    ``resumes``: whether earlier copies may be read. If not, they are deleted.
    ``group``: a gloo group of all processes that nothing else uses (None: one process).
    ``on_host``: the number of ranks on each host."""

    def __init__(
        self,
        folder: Path,
        every: int,
        key: str,
        spec: Any,
        resumes: bool = True,
        group: Any = None,
        on_host: int = 1,
    ) -> None:
        self._folder, self._every, self._key, self._spec = folder, every, key, spec
        self._resumes, self._group, self._on_host = resumes, group, on_host
        self._ranks = 1 if group is None else dist.get_world_size(group)
        self._buffers: list[Tensor] = []
        self._thread: threading.Thread | None = None
        self._messages: list[str] = []

    def resume(self, state: TrainState, after: int) -> TrainState | None:
        """Fill ``state`` from the newest copies. None: no copies are of a later step than
        ``after``, and ``state`` is as it was. Raises UserError if a host has no room for copies."""
        if not self._every:
            return None
        own = tensors(state, self._spec)
        told = self._gather((sum(x.nbytes for x in own), self._whole_files()))
        sizes = [size for size, _ in told]
        self._check_room(sizes)
        held = [Held(head, by) for by, (_, heads) in enumerate(told) for head in heads]
        hosts = [r // self._on_host for r in range(self._ranks)]
        found = holders(held, sizes, hosts)
        if found is None or found[0] <= after:
            return None
        for head in (head for head, by in held if head.step == found[0]):
            if hosts[by := found[1][head.rank]] != hosts[head.rank]:
                self._move(head, by)
        mine = next(head for head, _ in held if (head.step, head.rank) == (found[0], rank()))
        head = read(self._folder / mine.name, own)
        self._messages.append(f"step {head.step} is loaded from the copies in {self._folder}")
        return TrainState(
            head.step, head.samples, state.params, replace(state.opt, step=head.updates)
        )

    def due(self, step: int) -> bool:
        """Whether a copy is made after this step."""
        return self._every > 0 and step % self._every == 0

    def save(self, state: TrainState) -> None:
        """Start to copy the state, if a copy is due. The device has finished the step. The state
        may change as soon as this call returns."""
        if not self.due(state.step):
            return
        self.wait()
        own = tensors(state, self._spec)
        if not self._buffers:
            self._buffers = [buffer_of(x) for x in own]
        with torch.no_grad():
            for buffer, x in zip(self._buffers, own, strict=True):
                buffer.copy_(x, non_blocking=True)
        if any(x.is_cuda for x in own):
            torch.cuda.synchronize()
        size = sum(x.nbytes for x in own)
        head = Head(state.step, rank(), state.samples, state.opt.step, size, self._key)
        self._thread = threading.Thread(target=self._copy, args=(head,), name="copy", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until no copy is made."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def drain_messages(self) -> list[str]:
        """Return the messages since the last call."""
        messages, self._messages = self._messages, []
        return messages

    def __enter__(self) -> MemoryCopies:
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        """Delete the copies of a run that has ended well: its last state is in a checkpoint, or
        nobody wants it. A run that fails leaves them to its next start."""
        if kind is None and self._every:
            self.wait()
            self._gather(None)  # until then, another rank of this host may write
            shutil.rmtree(self._folder, ignore_errors=True)

    def _gather(self, value: Any) -> list[Any]:
        if self._group is None:
            return [value]
        found: list[Any] = [None] * self._ranks
        dist.all_gather_object(found, value, group=self._group)
        return found

    def _whole_files(self) -> list[Head]:
        """Return the heads of this run's whole files. The processes of a host share the work."""
        place = rank() % self._on_host
        if not self._resumes:
            if place == 0:
                shutil.rmtree(self._folder, ignore_errors=True)
            return []
        names = sorted(os.listdir(self._folder)) if self._folder.is_dir() else []
        files = [self._folder / name for name in names if NAME.fullmatch(name)]
        heads = (whole(file) for file in files[place :: self._on_host])
        return [head for head in heads if head is not None and head.key == self._key]

    def _check_room(self, sizes: Sequence[int]) -> None:
        """Raise UserError on all ranks if one host lacks room. ``sizes``: of the ranks' tensors."""
        first, problem = rank() // self._on_host * self._on_host, None
        here = sum(sizes[first : first + self._on_host])
        if self._ranks > self._on_host:  # and the copies of the host before
            here += sum(sizes[first - self._on_host : first or None])
        try:
            check_room(self._folder, (KEPT + 1) * here, "--memory-copies-dir")
        except UserError as error:
            problem = str(error)
        for found in self._gather(problem):
            if found is not None:
                raise UserError(found)

    def _copy(self, head: Head) -> None:
        """Write the buffers here and on the next host, and delete older steps. In the thread."""
        try:
            parts = map(octets, self._buffers)
            written = self._on_all_ranks(lambda: write(self._folder, head, parts))
            if self._ranks > self._on_host:
                self._on_all_ranks(lambda: self._exchange(written))
        except _Failed as failure:
            self._messages.append(
                f"warning: {self._folder}: cannot hold the copies of step {head.step} ({failure}); "
                "training goes on"
            )
        else:
            self._delete_before(head.step)

    def _on_all_ranks(self, fn: Callable[[], Any]) -> list[Any]:
        """Run ``fn`` on every rank and return all results. A failure on one rank is a failure on
        all ranks."""
        value = problem = None
        try:
            value = fn()
        except (OSError, RuntimeError) as error:
            problem = getattr(error, "strerror", None) or str(error).splitlines()[0]
        try:
            told = self._gather((value, problem))
        except RuntimeError as error:  # another rank has ended: the main thread will notice too
            raise _Failed(str(error).splitlines()[0]) from error
        for r, (_, other) in enumerate(told):
            if other is not None:
                raise _Failed(f"rank {r}: {other}")
        return [v for v, _ in told]

    def _exchange(self, heads: Sequence[Head]) -> None:
        """Send this rank's file to the next host, and write the file that the host before sends.

        ``heads``: of the files of all ranks."""
        own, after = heads[rank()], (rank() + self._on_host) % self._ranks
        other = heads[(rank() - self._on_host) % self._ranks]
        sender = threading.Thread(target=self._send, args=(own, after), daemon=True)
        sender.start()
        found = write(self._folder, other, self._received(other.size, other.rank))
        sender.join()
        if found.crc32 != other.crc32:
            raise OSError(0, f"the file of rank {other.rank} has changed on its way")

    def _send(self, head: Head, to: int) -> None:
        with (self._folder / head.name).open("rb") as file, suppress(RuntimeError):
            read_head(file)
            while data := file.read(CHUNK):
                sent = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                dist.send(sent, to, group=self._group)  # an error: the other rank has ended

    def _received(self, size: int, source: int) -> Iterator[memoryview]:
        for start in range(0, size, CHUNK):
            got = torch.empty(min(CHUNK, size - start), dtype=torch.uint8)
            dist.recv(got, source, group=self._group)
            yield octets(got)

    def _move(self, head: Head, by: int) -> None:
        """Send a file from process ``by`` to its own rank, which writes it."""
        if rank() == by:
            self._send(head, head.rank)
        elif rank() == head.rank:
            write(self._folder, head, self._received(head.size, by))

    def _delete_before(self, step: int) -> None:
        """Keep the last steps up to this one. Every process deletes the files that it wrote."""
        wrote = {rank(), (rank() - self._on_host) % self._ranks}
        found = [m for name in os.listdir(self._folder) if (m := NAME.fullmatch(name))]
        kept = sorted({int(m[1]) for m in found if int(m[1]) <= step})[-KEPT:]
        for m in found:
            if int(m[2]) in wrote and int(m[1]) not in kept:
                with suppress(FileNotFoundError):
                    (self._folder / m[0]).unlink()


class _Failed(Exception):
    pass
