"""Writes a safetensors file, one tensor at a time.

The ``safetensors`` library writes a file only if all tensors of the file are in memory. Here each
tensor is made when it is written, and may be freed afterwards. The header comes first in a file and
needs only dtypes and shapes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtron.checkpoint.safetensors import STORED

DTYPE_NAMES = {dtype: name for name, dtype in STORED.items()}


def write_file(
    path: Path,
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    make: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    *,
    sync: bool = False,
) -> None:
    """Write tensors into a file at a path; see ``write_tensors``.

    ``sync``: whether to wait until the disk has the bytes."""
    with path.open("wb") as file:
        write_tensors(file, tensors, make, metadata)
        if sync:
            file.flush()
            os.fsync(file.fileno())


def write_tensors(
    file: Any,
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    make: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write tensors in this order.

    ``file``: has ``write``, and is written from its begin to its end.
    ``tensors``: dtype and shape of each tensor by name.
    ``make``: makes the tensor of a name.
    ``metadata``: strings for the header."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, (dtype, shape) in tensors.items():
        end = begin + math.prod(shape) * dtype.itemsize
        offsets = [begin, end]
        entries[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": offsets,
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
    file.write(len(text).to_bytes(8, "little") + text)
    for name, (dtype, shape) in tensors.items():
        x = make(name).to(dtype).contiguous()
        assert x.shape == tuple(shape), f"{name}: made {tuple(x.shape)}, announced {tuple(shape)}"
        file.write(x.view(-1).view(torch.uint8).numpy().data)
