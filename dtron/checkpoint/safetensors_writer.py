"""Writes tensors into safetensors files, one tensor at a time.

The ``safetensors`` library writes a file only if all tensors of the file are in memory. Here each
tensor is made when it is written, and freed afterwards. The header comes first in a file and needs
only the shapes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtron.checkpoint.safetensors import DTYPES, INDEX, SINGLE

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write(
    folder: Path,
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    make: Callable[[str], Tensor],
    largest: int,
) -> list[Path]:
    """Write tensors into ``folder`` in this order and return the files. Each tensor is made when it
    is written, and freed afterwards.

    ``shapes``: the shape of each tensor by name.
    ``make``: makes the tensor of a name.
    ``largest``: maximum bytes of one file. A new file begins before a file would exceed this size.
    Several files get an index."""

    def size(name: str) -> int:
        return math.prod(shapes[name]) * dtype.itemsize

    parts: list[list[str]] = [[]]
    for name in shapes:
        if parts[-1] and sum(map(size, parts[-1])) + size(name) > largest:
            parts.append([])
        parts[-1].append(name)
    files = [SINGLE] if len(parts) == 1 else [_file(i, len(parts)) for i in range(len(parts))]
    for file, names in zip(files, parts, strict=True):
        _write_file(folder / file, {name: shapes[name] for name in names}, dtype, make)
    if len(parts) > 1:
        where = {name: file for file, names in zip(files, parts, strict=True) for name in names}
        total = {"total_size": sum(map(size, shapes))}
        (folder / INDEX).write_text(
            json.dumps({"metadata": total, "weight_map": where}, indent=2) + "\n"
        )
    return [folder / file for file in files]


def _file(i: int, n: int) -> str:
    return f"model-{i + 1:05d}-of-{n:05d}.safetensors"


def _write_file(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    make: Callable[[str], Tensor],
) -> None:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape in shapes.items():
        end = begin + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            x = make(name).to(dtype).contiguous()
            assert x.shape == tuple(shape), (
                f"{name}: made {tuple(x.shape)}, announced {tuple(shape)}"
            )
            file.write(x.view(-1).view(torch.uint8).numpy().data)
