"""Collectives that copy engines carry, so that all processors are left to matrix products.

NCCL moves data with kernels, and these take processors (SMs) from the products they are to hide behind: under
ZeRO-3 a collective is under way a quarter of the time. But an all-gather adds nothing up, and neither does
the all-to-all in which gradients are sent to where they are summed (dtensor.py, ``_land``). Both are copies
out of another GPU's memory, and for these a GPU has engines of their own. So the process groups of the axes
that ZeRO shards over are ``Copies``: functional collectives, DTensor and inductor's scheduler find an
ordinary group, of which these two kinds are pulled from *symmetric memory*, memory of each rank that all of
them have mapped, on a stream of their own, after a barrier that says what is to be pulled is there. Anything
else, and what does not fit, is NCCL's.

What is pulled must lie in symmetric memory. A weight's part does from the beginning (``in_reach``); anything
else is copied there first. So one gather per weight costs least, and inductor lays none end to end
(``carried``; see compiled.py).

Nobody says that a weight has been pulled and may be written again: a step has its gradients only when its
weights have landed, and no rank goes on to write before all ranks' gradients are in the norm.

Left out: reductions in flight (NVLink's switches could add; multicast is off on many machines), groups over
several hosts, and more than one engine at a time.

Everything private here is this file's alone: symmetric memory, and a group written in Python."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dtron.dtensor import like, local
from dtron.params import flat, unflatten
from dtron.rules import RULES, expand
from dtron.shape import MeshShape

STAGE = 2**27  # bytes of symmetric memory for what is not there yet; what is larger goes by NCCL
ALIGNED = 256  # bytes


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


class Copies(dist.ProcessGroup):
    """A group whose all-gathers and even all-to-alls are copies. ``meet(memory)`` makes a Room of memory that
    each rank has allocated alike; ``rest`` is the backend for anything else."""

    def __init__(
        self, rest: Any, rank: int, size: int, device: str, meet: Callable[[Tensor], Room], timeout: timedelta
    ):
        super().__init__(rank, size)
        kind = {"cuda": dist.ProcessGroup.BackendType.NCCL, "cpu": dist.ProcessGroup.BackendType.GLOO}[device]
        self._register_backend(torch.device(device), kind, rest)
        self._rest, self._rank, self._size, self._meet = rest, rank, size, meet
        self._patience = int(timeout.total_seconds() * 1000)
        self._stage: tuple[Tensor, Room] | None = None
        self._near: tuple[Tensor, Room] | None = None
        self._stream: torch.cuda.Stream | None = None

    def getBackendName(self) -> str:
        return "copies"

    def meet(self, memory: Tensor) -> None:
        """From now on what lies in here need not be copied before it is sent. All ranks must call this."""
        self._near = memory, self._meet(memory)

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

    def _copied(self, copy: Callable[[Tensor, Tensor], None], outs: list[Tensor], xs: list[Tensor]) -> Landed:
        with self._beside(xs[0].device) as landed:
            for out, x in zip(outs, xs, strict=True):
                copy(out.view(-1), x.view(-1))
        return Landed([landed], (outs, xs))

    def _gather(self, out: Tensor, x: Tensor) -> None:
        at, room = self._at(x), self._near and self._near[1]
        if at is None:
            at, room = 0, self._staged(x.device, [(0, x)])
        room.barrier(timeout_ms=self._patience)
        theirs = lambda peer: room.get_buffer(peer, x.shape, x.dtype, at // x.itemsize)
        self._pull(out.view(self._size, -1), x, theirs)

    def _swap(self, out: Tensor, x: Tensor) -> None:
        parts = x.view(self._size, -1)
        n = parts.shape[1]
        room = self._staged(x.device, [(i * n, parts[i]) for i in range(self._size) if i != self._rank])
        room.barrier(timeout_ms=self._patience)
        theirs = lambda peer: room.get_buffer(peer, [n], x.dtype, self._rank * n)
        self._pull(out.view(self._size, -1), parts[self._rank], theirs)

    def _pull(self, rows: Tensor, own: Tensor, theirs: Callable[[int], Tensor]) -> None:
        for step in range(1, self._size):  # each rank begins with another
            peer = (self._rank + step) % self._size
            rows[peer].copy_(theirs(peer))
        rows[self._rank].copy_(own)

    def _staged(self, device: torch.device, parts: list[tuple[int, Tensor]]) -> Room:
        """Symmetric memory with these parts in it, each at its place (in elements)."""
        if self._stage is None:
            memory = _symmetric(STAGE, device)
            self._stage = memory, self._meet(memory)
        memory, room = self._stage
        room.barrier(timeout_ms=self._patience)  # nobody reads any more what was here
        for at, x in parts:
            memory.view(x.dtype)[at : at + x.numel()].copy_(x)
        return room

    @contextmanager
    def _beside(self, device: torch.device) -> Iterator[Callable[[], Any]]:
        """What is begun in here is done on a stream of its own, after all that is asked for so far; yields
        how to wait for its end."""
        if device.type != "cuda":
            yield lambda: None
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(device, priority=-1)
        done = torch.cuda.Event()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield lambda: torch.cuda.current_stream().wait_event(done)
            done.record()


def _symmetric(size: int, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.empty(size, dtype=torch.uint8, device=device)
    import torch.distributed._symmetric_memory as symmetric  # takes a second, and a CPU has none

    return symmetric.empty(size, dtype=torch.uint8, device=device)


def _made(group: Any, options: Any) -> Copies:
    """What torch calls for a group of backend "copies"."""
    from torch._C._distributed_c10d import _register_process_group

    rank, size, timeout = group.group_rank, group.group_size, group.timeout
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    nccl = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", group.store), rank, size, options)
    nccl._set_sequence_number_for_group()
    # Ranks meet by an ordinary group of the same ranks: torch asks it for its store, and a group written in
    # Python has none.
    name = f"{group.group_id}.copies"
    place = dist.ProcessGroup(dist.PrefixStore("copies", group.store), rank, size)
    _register_process_group(name, place)  # which does not keep it alive
    return Copies(nccl, rank, size, "cuda", lambda memory, place=place: _met(memory, name), timeout)


def _met(memory: Tensor, group: str) -> Room:
    import torch.distributed._symmetric_memory as symmetric

    try:
        return symmetric.rendezvous(memory, group)
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"GPUs of this host cannot share memory ({why}); use --copy-engines off") from error


def backends(shape: MeshShape, device: str) -> dict[str, str] | None:
    """For ``init_device_mesh``: the dims of the mesh whose groups are to be Copies, all that ZeRO shards over
    and whose groups are of one host, where GPUs reach each other's memory. None: no dim."""
    atoms, here = shape.atoms, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device != "cuda" or not atoms or not _peers(here):
        return None
    if not hasattr(dist.Backend, "COPIES"):
        dist.Backend.register_backend("copies", _made, extended_api=True, devices=["cuda"])
    spans, span = {}, 1
    for atom, n in reversed(atoms.items()):
        span *= n
        spans[atom] = span  # a group's first and last rank are less than this apart
    chosen = expand(RULES["embed"], tuple(atoms))
    return {atom: "copies" for atom in chosen if here % spans[atom] == 0} or None


def _peers(count: int) -> bool:
    mine = torch.cuda.current_device()
    return all(torch.cuda.can_device_access_peer(mine, i) for i in range(count) if i != mine)


def carried(mesh: DeviceMesh | None) -> bool:
    """Whether copy engines carry the gathers of weights."""
    return bool(_groups(mesh))


def _groups(mesh: DeviceMesh | None) -> dict[int, Copies]:
    """Those of a mesh that are Copies, by its dim."""
    groups = {} if mesh is None else {i: mesh.get_group(i) for i in range(mesh.ndim)}
    return {i: group for i, group in groups.items() if isinstance(group, Copies)}


def in_reach(tree: Any) -> Any:
    """The same tree of DTensors; what a group would gather has its parts moved to symmetric memory."""
    tensors = flat(tree)
    mesh = next((x.device_mesh for x in tensors if isinstance(x, DTensor)), None)
    groups = _groups(mesh)
    away = [j for j, x in enumerate(tensors) if any(x.placements[i].is_shard() for i in groups) and _even(x)]
    if not away:
        return tree
    parts = [local(tensors[j]) for j in away]
    sizes = [-(-x.nbytes // ALIGNED) * ALIGNED for x in parts]
    memory = _symmetric(sum(sizes), parts[0].device)
    for j, part, room in zip(away, parts, memory.split(sizes), strict=True):
        there = room[: part.nbytes].view(part.dtype).view(part.shape)
        tensors[j] = like(tensors[j], there.copy_(part))
    for group in groups.values():
        group.meet(memory)
    return unflatten(tree, tensors)


def _even(x: DTensor) -> bool:
    """Whether all ranks have parts of one size, so that these lie at the same place in each one's memory.
    (Others are padded before they are gathered, and then lie elsewhere.)"""
    cuts = [1] * x.ndim
    for n, at in zip(x.device_mesh.shape, x.placements, strict=True):
        if at.is_shard():
            cuts[at.dim] *= n
    return all(size % n == 0 for size, n in zip(x.shape, cuts, strict=True))
