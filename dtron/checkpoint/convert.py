"""Converts checkpoints of format 3 to today's format.

Format 3 was written by ``torch.distributed.checkpoint``, whose ``.metadata`` is a pickle. A pickle
can run any code when it is read. So nothing but this module reads the format, and only the command
``python -m dtron.checkpoint convert RUN --trust`` calls the module.

Each tensor is read whole and written into one file. The old checkpoint is replaced when the new one
is complete.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dtron.checkpoint import files
from dtron.checkpoint.local_storage import LocalStorage, describe
from dtron.checkpoint.meta import FORMAT, META, Meta, Part, TensorMeta
from dtron.checkpoint.safetensors_writer import DTYPE_NAMES, write_file
from dtron.errors import UserError
from dtron.json_files import read_object

OLD_FORMAT = 3
_FILE = "rank-00000.safetensors"


def old_checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoints of a run that have format 3."""
    old = (one.path for one in files.found(run_dir) if one.format == OLD_FORMAT)
    return [path for path in old if isinstance(path, Path)]


def convert(path: Path) -> None:
    """Replace a checkpoint of format 3 by one of today's format. Unpickles its ``.metadata``.
    Raises UserError if the checkpoint is damaged."""
    old = read_object(path / META)
    _check(path, old)
    reader = dcp.FileSystemReader(path)
    known = reader.read_metadata().state_dict_metadata
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, entry in known.items():
        if (
            not isinstance(entry, TensorStorageMetadata)
            or entry.properties.dtype not in DTYPE_NAMES
        ):
            raise UserError(f"{path}: {name} is no tensor; this is no checkpoint of dtron")
        tensors[name] = entry.properties.dtype, tuple(entry.size)

    def make(name: str) -> Tensor:
        dtype, shape = tensors[name]
        state: dict[str, Any] = {name: torch.empty(shape, dtype=dtype)}
        dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=True)
        return state[name]

    part = path.with_name(path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    write_file(part / _FILE, tensors, make, {"format": "pt"}, sync=True)
    described = {
        name: TensorMeta(DTYPE_NAMES[dtype], shape, (Part(_FILE, (0,) * len(shape), shape),))
        for name, (dtype, shape) in tensors.items()
    }
    meta = Meta(
        format=FORMAT,
        step=old["step"],
        samples=old["samples"],
        updates=old["updates"],
        identity=old["identity"],
        files={_FILE: describe(part / _FILE)},
        tensors=described,
    )
    LocalStorage().finish(part, path, meta)


def _check(path: Path, old: dict[str, Any]) -> None:
    """Compare sizes and checksums of the listed files, and that no other file is there."""
    try:
        listed = {str(name): (int(size), int(crc)) for name, (size, crc) in old["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path / META}: has no table of files ({error})") from error
    there = {file.name for file in path.iterdir()} - {META}
    if there != set(listed):
        wrong = ", ".join(sorted(there ^ set(listed))[:3])
        raise UserError(f"{path}: {wrong}: the files are not the files that {META} lists")
    for name, (size, crc) in listed.items():
        file = path / name
        if file.stat().st_size != size or describe(file).crc32 != crc:
            raise UserError(f"{file}: is damaged, its checksum is another")
