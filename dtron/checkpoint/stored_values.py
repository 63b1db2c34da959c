"""Reads a state of one format from a checkpoint of another.

The formats of moments and of master weights are described in training/state_formats.py. A run may
go on with other formats: moments in float32 become float8, split master weights become float32
ones, and so on. A tensor is read as numbers in float32, and written in the format of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dtron.checkpoint.shards import Shard, ShardReader, shard_of
from dtron.training.state_formats import (
    BLOCK,
    MASTERS_LOW,
    ROOT_SCALES,
    SCALES,
    Stored,
    blocked_dim,
    is_part,
    join,
    scaled,
    write,
)

_HALF = 0x8000  # in place of a random number: rounds to the nearest number


def read_state(
    reader: ShardReader, tensors: Mapping[str, Tensor], saved_as: Mapping[str, str]
) -> None:
    """Fill the tensors of a state from a checkpoint.

    ``tensors``: by kind and path, as ``m.blocks.0.mlp.w_up``.
    ``saved_as``: the names of the tensors in the checkpoint."""
    for name, x in tensors.items():
        kind, _, path = name.partition(".")
        if is_part(kind):
            continue  # read with the tensor to which it belongs
        of_run = parts(tensors, kind, path)
        saved, _, _ = saved_as[name].partition(".")
        of_checkpoint = parts(reader.meta.tensors, saved, path)
        if not of_checkpoint:
            reader.read(saved_as[name], shard_of(x))  # says that it is not there
        if of_run.keys() == of_checkpoint.keys():
            for part, (_, y) in of_run.items():
                reader.read(of_checkpoint[part][0], shard_of(y))
            continue
        values = _values(reader, of_checkpoint, shard_of(x))
        more = next((y for part, (_, y) in of_run.items() if part), None)
        stored = Stored(x, more, ROOT_SCALES in of_run).local()
        dtype = torch.float32 if stored.data.dtype.itemsize < 4 else stored.data.dtype
        values = values.to(stored.data.device, dtype)
        half = torch.full(values.shape, _HALF, dtype=torch.int32, device=values.device)
        write(stored, values, torch.ones((), dtype=torch.bool, device=values.device), half)


def parts(tensors: Mapping[str, Any], kind: str, path: str) -> dict[str, tuple[str, Any]]:
    """Return a tensor and the tensor that belongs to it, each with its name. The key is what the
    second one is; the key of the tensor itself is empty."""
    names = {"": f"{kind}.{path}"}
    if kind == "params":
        names[MASTERS_LOW] = f"{MASTERS_LOW}.{path}"
    else:
        names |= {part: f"{kind}{part}.{path}" for part in (SCALES, ROOT_SCALES)}
    return {part: (name, tensors[name]) for part, name in names.items() if name in tensors}


def read_values(reader: ShardReader, kind: str, path: str, shard: Shard) -> Tensor:
    """Return the numbers of a shard, in float32 at least, on the CPU. ``shard.local`` is not
    filled."""
    return _values(reader, parts(reader.meta.tensors, kind, path), shard)


def _values(reader: ShardReader, saved: Mapping[str, tuple[str, Any]], shard: Shard) -> Tensor:
    shape = shard.local.shape

    def read(name: str, dtype: torch.dtype) -> Tensor:
        x = torch.empty(shape, dtype=dtype)
        reader.read(name, shard._replace(local=x))
        return x

    name, meta = saved[""]
    if MASTERS_LOW in saved:
        low = read(saved[MASTERS_LOW][0], torch.int16)
        return join(read(name, torch.bfloat16), low)
    scales = next((saved[part] for part in (SCALES, ROOT_SCALES) if part in saved), None)
    if scales is None:
        return read(name, torch.float64 if meta.dtype == "F64" else torch.float32)
    # A shard of this run need not consist of whole blocks. Scales are few, so all are read.
    exponents = torch.empty(scales[1].shape, dtype=torch.int8)
    reader.read(scales[0], Shard(tuple(scales[1].shape), (0,) * exponents.ndim, exponents))
    dim = blocked_dim(meta.shape, exponents.shape)
    index = torch.arange(shard.start[dim], shard.start[dim] + shape[dim]) // BLOCK
    box = [slice(a, a + n) for a, n in zip(shard.start, shape, strict=True)]
    box[dim] = slice(None)
    of_elements = exponents[tuple(box)].index_select(dim, index)
    return scaled(read(name, torch.float8_e4m3fn), of_elements, ROOT_SCALES in saved)
