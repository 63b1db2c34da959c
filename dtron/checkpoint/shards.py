"""The shards of a checkpoint: which of them a rank writes, and how any rank reads its own.

A rank writes its shard of each tensor into one safetensors file, ``rank-00003.safetensors``. If
several ranks hold the same shard, one of them writes it. They take turns: the replica ``i % R`` of
R replicas writes the i-th tensor. No communication is needed for this choice.

A rank reads the parts that overlap its own shard, wherever they are. So the mesh that reads may
differ from the mesh that wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor

from dtron.checkpoint.meta import REMEDY, FileMeta, Meta, Part, TensorMeta
from dtron.checkpoint.safetensors import STORED, TensorReader, header
from dtron.checkpoint.safetensors_writer import DTYPE_NAMES, write_tensors
from dtron.checkpoint.storage import AnyPath, storage_of
from dtron.distributed.redistribute import shard_start, to_local
from dtron.errors import UserError


class Shard(NamedTuple):
    """A shard of a tensor.

    ``shape``: the shape of the whole tensor.
    ``start``: the index of the shard's first element.
    ``local``: the elements."""

    shape: tuple[int, ...]
    start: tuple[int, ...]
    local: Tensor

    def part(self, file: str) -> TensorMeta:
        part = Part(file, self.start, tuple(self.local.shape))
        return TensorMeta(DTYPE_NAMES[self.local.dtype], self.shape, (part,))


def shard_of(x: Tensor) -> Shard:
    """Return this rank's shard of a tensor."""
    return Shard(tuple(x.shape), shard_start(x), to_local(x))


def shards_to_write(tensors: Mapping[str, Tensor]) -> dict[str, Shard]:
    """Return the shards that this rank writes, of tensors that all ranks of a mesh hold."""
    writes = {name: x for i, (name, x) in enumerate(tensors.items()) if _is_writer(x, i)}
    shards = {name: shard_of(x) for name, x in writes.items()}
    return {name: shard for name, shard in shards.items() if shard.local.numel()}


def _is_writer(x: Tensor, i: int) -> bool:
    if not isinstance(x, DTensor):
        return True
    coordinate = x.device_mesh.get_coordinate()
    assert coordinate is not None
    replica, replicas = 0, 1
    for size, own, placement in zip(x.device_mesh.shape, coordinate, x.placements, strict=True):
        if placement.is_replicate():
            replica, replicas = replica * size + own, replicas * size
    return replica == i % replicas


def write_shards(
    path: AnyPath, shards: Mapping[str, Shard]
) -> tuple[FileMeta, dict[str, TensorMeta]]:
    """Write shards into a file. Return the descriptions of the file and of the shards."""
    tensors = {name: (s.local.dtype, s.local.shape) for name, s in shards.items()}

    def make(name: str) -> Tensor:
        return shards[name].local

    def fill(file: Any) -> None:
        write_tensors(file, tensors, make, {"format": "pt"})

    written = storage_of(path).write(path, fill)
    return written, {name: s.part(path.name) for name, s in shards.items()}


def merged(described: Sequence[Mapping[str, TensorMeta]]) -> dict[str, TensorMeta]:
    """Merge the descriptions of all ranks: each tensor with its parts."""
    parts: dict[str, list[Part]] = {}
    first: dict[str, TensorMeta] = {}
    for each in described:
        for name, tensor in each.items():
            first.setdefault(name, tensor)
            parts.setdefault(name, []).extend(tensor.parts)
    return {n: TensorMeta(t.dtype, t.shape, tuple(parts[n])) for n, t in first.items()}


class ShardReader:
    """Reads shards of the tensors of a checkpoint.

    ``path``: the place of the checkpoint."""

    def __init__(self, path: AnyPath, meta: Meta) -> None:
        self.path, self.meta = path, meta
        self._files: dict[str, TensorReader] = {}

    def read(self, name: str, shard: Shard) -> None:
        """Fill ``shard.local`` from the parts that overlap it. Raises UserError if the checkpoint
        lacks the tensor or some of its elements, or has another shape."""
        tensor = self.meta.tensors.get(name)
        if tensor is None:
            raise UserError(f"{self.path}: has no {name}; {REMEDY}")
        if tensor.shape != shard.shape:
            raise UserError(
                f"{self.path}: {name} is {list(tensor.shape)}, and here {list(shard.shape)}; use "
                "the model that it was made with"
            )
        filled = 0
        for part in tensor.parts:
            inside, box, empty = [], [], False
            for a, n, b, m in zip(
                shard.start, shard.local.shape, part.start, part.shape, strict=True
            ):
                first, stop = max(a, b), min(a + n, b + m)
                empty = empty or first >= stop
                inside.append(slice(first - a, stop - a))
                box.append((first - b, stop - b))
            if not empty:
                into = shard.local[tuple(inside)]
                self._fill(into, name, part, tensor.dtype, box)
                filled += into.numel()
        if filled != shard.local.numel():
            raise UserError(
                f"{self.path}: {name} has {filled} of {shard.local.numel()} elements; {REMEDY}"
            )

    def _fill(
        self, into: Tensor, name: str, part: Part, dtype: str, box: list[tuple[int, int]]
    ) -> None:
        reader = self._reader(part.file)
        entry = reader.entries.get(name)
        if entry is None or entry.shape != part.shape or entry.dtype != dtype:
            raise UserError(
                f"{self.path / part.file}: does not have {name} as {dtype} {list(part.shape)}; "
                f"{REMEDY}"
            )
        direct = into.is_contiguous() and into.device.type == "cpu" and into.dtype == STORED[dtype]
        stored = reader.read_stored(name, box, into if direct else None)
        if stored is not into:
            into.copy_(stored)

    def _reader(self, file: str) -> TensorReader:
        if file not in self._files:
            entries = header(self.path / file, follow=False)
            self._files[file] = TensorReader(entries, follow=False)
        return self._files[file]

    def close(self) -> None:
        for reader in self._files.values():
            reader.close()
        self._files.clear()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
