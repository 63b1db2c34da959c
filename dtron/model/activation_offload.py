"""Offload of activations to host memory: they leave the device in forward, and come back in
backward.

The tensors that a block saves for backward are copied to the host while the next block runs. In
backward they are copied back while the block after runs its backward:

    forward:   block 1 | copy out 1, block 2 | copy out 2, block 3
    backward:  copy in 2, block 3 | copy in 1, block 2 | block 1

(vDNN, Rhu et al. 2016, arXiv:1602.08124, section 3.2, offloads and prefetches layers in this way.)
The device holds the activations of about two blocks. The copies take no SM from the matmuls. They
are free as long as a block takes longer than its copies.

The device keeps the inputs of a block besides its activations (weights, rotary tables, masks), the
block's output, which belongs to the next block, the stage's input, which the stage keeps anyway,
and small tensors. The storage of a tensor is copied once, however many views of it are saved.

The hooks of torch on saved tensors (distributed/saved_tensors.py) do the work, around the call of a
block. So eager and compiled blocks are treated alike, and a compiled block has the graphs of a
block that keeps everything.

A ``BlockActivations`` belongs to one block and one microbatch. Only the autograd graph refers to
it, so its memory lives as long as the graph of its block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtron.distributed.host_memory import HostMemory
from dtron.distributed.saved_tensors import saved_by, storage_id, take_apart
from dtron.torch_compile import tracing
from dtron.tree import flat

Make = Callable[[Sequence[Tensor]], Tensor]


class View(NamedTuple):
    """A tensor as a view of a numbered storage."""

    number: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def of(x: Tensor, number: int) -> View:
        return View(number, x.dtype, x.size(), x.stride(), int(x.storage_offset()))

    def on(self, memory: Tensor) -> Tensor:
        """Return the view of the storage of ``memory``."""
        with torch.no_grad():
            numbers = memory[: memory.numel() // self.dtype.itemsize * self.dtype.itemsize]
            return numbers.view(self.dtype).as_strided(self.size, self.stride, self.offset)


class Saved(NamedTuple):
    """A tensor that a block has saved.

    ``parts``: the plain tensors inside of it, some of them as views.
    ``make``: makes the tensor from its parts."""

    parts: list[Tensor | View]
    make: Make


@dataclass
class Storage:
    """A storage that may leave the device.

    ``memory``: its bytes on the device; None: they are on the host alone.
    ``host``: a buffer on the host; None: the storage stays, or is back."""

    memory: Tensor | None
    nbytes: int
    device: torch.device
    host: Tensor | None = None


class BlockActivations:
    """The activations that one block saves on one microbatch.

    ``before``: the activations of the block before.
    ``smallest``: the bytes of the smallest tensor that leaves the device; None: nothing leaves.
    ``stay``: the ``storage_id`` of tensors that stay on the device."""

    def __init__(
        self,
        host: HostMemory,
        before: BlockActivations | None,
        smallest: int | None,
        stay: set[int],
    ):
        self._host, self._before, self._smallest, self._stay = host, before, smallest, stay
        self._storages: list[Storage] = []
        self._numbers: dict[int, int] = {}  # ``storage_id``: its index
        self._left: Callable[[], None] | None = None  # these two wait for copies on their way
        self._arrived: Callable[[], None] | None = None
        self._in_backward = False

    def pack(self, x: Tensor) -> Any:
        """Save a tensor for backward."""
        if tracing():
            return x
        parts, make = take_apart(x)
        return Saved([self._part(part) for part in parts], make)

    def _part(self, x: Tensor) -> Tensor | View:
        memory = x.untyped_storage()
        number, nbytes = storage_id(x), memory.nbytes()
        small = self._smallest is None or nbytes < max(1, self._smallest)
        if small or number in self._stay:
            return x
        if number not in self._numbers:
            self._numbers[number] = len(self._storages)
            with torch.no_grad():
                numbers = x.as_strided((nbytes // x.element_size(),), (1,), 0)
                whole = numbers.view(torch.uint8)
            self._storages.append(Storage(whole, nbytes, x.device))
        return View.of(x, self._numbers[number])

    def copy_out(self, outputs: Sequence[Tensor]) -> None:
        """Start the copies to the host, after the block. Then free what the block before has
        copied.

        ``outputs``: the outputs of the block, which stay."""
        for number in storages(outputs):
            self._numbers.pop(number, None)
        pairs = []
        for number in self._numbers.values():
            storage = self._storages[number]
            assert storage.memory is not None
            storage.host = self._host.take(storage.memory)
            pairs.append((storage.memory, storage.host))
        if pairs:
            self._left = self._host.copy_out(pairs)
        self._numbers.clear()
        if self._before is not None:
            self._before.leave()

    def leave(self) -> None:
        """Wait for the copies to the host, and free the device's memory."""
        if self._left is not None:
            self._left()
            self._left = None
            for storage in self._away:
                storage.memory = None

    @property
    def _away(self) -> list[Storage]:
        return [storage for storage in self._storages if storage.host is not None]

    def copy_in(self) -> None:
        """Start the copies from the host, unless they are on their way or have arrived."""
        self.leave()
        if self._arrived is not None or not self._away:
            return
        pairs = []
        for storage in self._away:
            assert storage.host is not None
            storage.memory = storage.host.new_empty(storage.nbytes, device=storage.device)
            pairs.append((storage.memory, storage.host))
        self._arrived = self._host.copy_in(pairs)

    def unpack(self, saved: Saved) -> Tensor:
        """Return a saved tensor. The first one waits for the copies of the block, and starts those
        of the block before."""
        if not self._in_backward:
            self._in_backward = True
            self.copy_in()
            if self._arrived is not None:
                self._arrived()
                self._arrived = None
            for storage in self._away:
                assert storage.host is not None
                self._host.give_back(storage.host)
                storage.host = None
            if self._before is not None:
                self._before.copy_in()
                self._before = None
        return saved.make([self._whole(part) for part in saved.parts])

    def _whole(self, part: Tensor | View) -> Tensor:
        if isinstance(part, Tensor):
            return part
        memory = self._storages[part.number].memory
        assert memory is not None
        return part.on(memory)


class StageActivations:
    """The activations of the blocks of one stage on one microbatch."""

    def __init__(self, host: HostMemory):
        self._host = host
        self._newest: BlockActivations | None = None

    def run(
        self,
        block: Callable[..., tuple[Tensor, ...]],
        inputs: tuple[Any, ...],
        x_TD: Tensor,
        smallest: int | None,
    ) -> tuple[Tensor, ...]:
        """Return ``block()``, the outputs of the next block of the stage.

        ``inputs``: the inputs of the block besides ``x_TD``.
        ``smallest``: see ``BlockActivations``."""
        stay = storages(tensors_of(inputs))
        if self._newest is None:
            stay |= storages([x_TD])
        own = BlockActivations(self._host, self._newest, smallest, stay)
        with saved_by(own.pack, own.unpack):
            outputs = block()
        own.copy_out(outputs)
        self._newest = own
        return outputs


class GatheredAgain:
    """Weights that a block all-gathers in forward and again in backward.

    ``unshard``: all-gathers the weights.
    ``sharded``: the weights before. A weight that shares its memory is not gathered."""

    def __init__(self, unshard: Callable[[], Any], sharded: Any):
        self._unshard, self._own = unshard, storages(tensors_of(sharded))
        self._numbers: dict[int, int] = {}
        self._parts: list[Tensor] = []

    def gather(self) -> Any:
        """Return the weights of the forward."""
        whole = self._unshard()
        found = [storage_id(part) for part in _parts(flat(whole))]
        self._numbers = {a: i for i, a in enumerate(found) if a not in self._own}
        return whole

    def pack(self, x: Tensor) -> Any:
        """Save a gathered weight, or a view of it, without its memory."""
        parts, make = take_apart(x)
        numbers = [self._numbers.get(storage_id(part)) for part in parts]
        views = [View.of(x, n) for x, n in zip(parts, numbers, strict=True) if n is not None]
        return Saved([*views], make) if len(views) == len(parts) else x

    def unpack(self, saved: Saved) -> Tensor:
        """Return a saved weight. The first one all-gathers all weights again."""
        if not self._parts:
            self._parts = _parts(flat(self._unshard()))
        views = [part for part in saved.parts if isinstance(part, View)]
        return saved.make([view.on(self._parts[view.number]) for view in views])


def storages(xs: Sequence[Tensor]) -> set[int]:
    """Return the ``storage_id`` of tensors."""
    return {storage_id(part) for part in _parts(xs)}


def _parts(xs: Sequence[Tensor]) -> list[Tensor]:
    return [part for x in xs for part in take_apart(x)[0]]


def tensors_of(x: Any) -> list[Tensor]:
    """Return the tensors in an argument: in containers, dataclasses and ``partial``."""
    if isinstance(x, Tensor):
        return [x]
    children: Sequence[Any] = ()
    if isinstance(x, partial):
        children = (x.func, x.args, x.keywords)
    elif isinstance(x, Mapping):
        children = list(x.values())
    elif isinstance(x, (tuple, list)):
        children = x
    elif is_dataclass(x) and not isinstance(x, type):
        children = [getattr(x, f.name) for f in fields(x)]
    return [tensor for child in children for tensor in tensors_of(child)]
