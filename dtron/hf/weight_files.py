"""The weight files of a Hugging Face folder: one file, or several files with an index.

``model.safetensors`` has all tensors, or ``model.safetensors.index.json`` names the file of each
tensor. As in transformers the single file counts if there are both, and a file has the tensors that
its own header names. A pickled checkpoint is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dtron.checkpoint.safetensors import Entry, TensorReader, header
from dtron.checkpoint.safetensors_writer import write_file
from dtron.errors import UserError
from dtron.json_files import is_there, read_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Reader(TensorReader):
    """The tensors of a folder, by name. Raises UserError for a folder without safetensors, and for
    files that are damaged or incomplete."""

    def __init__(self, folder: Path):
        super().__init__(_entries(folder))


def _entries(folder: Path) -> dict[str, Entry]:
    """Return the tensors of a folder: of the single file if there is one, as transformers does, and
    otherwise of all files that the index names."""
    index, single = folder / INDEX, folder / SINGLE
    if is_there(single):
        return header(single)
    if is_there(index):
        where = read_object(index).get("weight_map")
        if not isinstance(where, dict) or not all(
            isinstance(f, str) and _plain(f) for f in where.values()
        ):
            raise UserError(
                f"{index}: has no weight_map from tensors to files beside it; write the index again"
            )
        names = sorted(set(where.values()))
        absent = [name for name in names if not is_there(folder / name)]
        if absent:
            there = sorted(file.name for file in folder.glob("*.safetensors"))
            raise UserError(
                f"{folder}: {INDEX} names {len(names)} files, of which {some(absent)} "
                f"{'is' if len(absent) == 1 else 'are'} missing; there is {some(there) or 'none'}"
            )
        out: dict[str, Entry] = {}
        for file in names:
            for name, entry in header(folder / file).items():
                if name in out:
                    raise UserError(
                        f"{folder}: {name} is in {out[name].file.name} and in {file}; remove the "
                        "file that is not of this model"
                    )
                out[name] = entry
        return out
    pickled = next(
        (f.name for p in ("*.bin", "*.pt", "*.pth", "*.ckpt") for f in folder.glob(p)), None
    )
    if pickled:
        raise UserError(
            f"{folder}: has {pickled}, a pickle, which can run any code when it is read; dtron "
            "reads safetensors only: convert it"
        )
    raise UserError(f"{folder}: no {SINGLE} and no {INDEX} in it; give the folder of a model")


def some(names: Sequence[str]) -> str:
    """Return the first names, and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _plain(name: str) -> bool:
    return bool(name) and Path(name).name == name


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
        tensors = {name: (dtype, shapes[name]) for name in names}
        write_file(folder / file, tensors, make, {"format": "pt"})
    if len(parts) > 1:
        where = {name: file for file, names in zip(files, parts, strict=True) for name in names}
        total = {"total_size": sum(map(size, shapes))}
        index = json.dumps({"metadata": total, "weight_map": where}, indent=2)
        (folder / INDEX).write_text(index + "\n")
    return [folder / file for file in files]


def _file(i: int, n: int) -> str:
    return f"model-{i + 1:05d}-of-{n:05d}.safetensors"
