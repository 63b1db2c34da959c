"""``meta.json``: what a checkpoint says about itself.

It has the step, the place in the data, the settings that must not change, and two tables:

- ``files``: size and CRC-32 of each file. No other file is read.
- ``tensors``: dtype and shape of each tensor, and its parts. A part is a range of the tensor that
  is in a file, under the tensor's name. ``["rank-00000.safetensors", [0, 0], [4, 8]]`` begins at
  index (0, 0) and has the shape (4, 8).

The last line is the CRC-32 of all bytes before it. So no bit of ``meta.json`` can change unseen.
The file is decoded into types (json_files.py): nothing in a checkpoint is ever executed.

Left out: ``torch.distributed.checkpoint``. Its own format is a pickle. Its safetensors format puts
all tensors of a rank into memory a second time to write them, and reads every file in the folder.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Struct

from dtron.errors import UserError
from dtron.json_files import decode
from dtron.renamed import current

FORMAT = 4
META = "meta.json"
HEAD_BYTES = 256
REMEDY = "delete it to resume from the one before"

Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
_HEAD = re.compile(rb'\{\s*"format": (\d{1,9}),\s*"step": (\d{1,18}),')
_TAIL = re.compile(rb',\n"crc32": (\d{1,10})\n\}\n\Z')


class Part(Struct, frozen=True, array_like=True):
    """A range of a tensor. ``start``: the index of its first element."""

    file: str
    start: tuple[Count, ...]
    shape: tuple[Count, ...]


class TensorMeta(Struct, frozen=True):
    """A tensor. ``dtype``: as in safetensors: ``F32``."""

    dtype: str
    shape: tuple[Count, ...]
    parts: tuple[Part, ...]


class FileMeta(Struct, frozen=True, array_like=True):
    """A file. ``size``: in bytes."""

    size: Count
    crc32: Count


class Meta(Struct, frozen=True, forbid_unknown_fields=True):
    """The content of ``meta.json``.

    ``samples``: the number of sequences of the data that have been used.
    ``updates``: the number of updates of the weights.
    ``identity``: the settings that must be the same when the run is resumed."""

    format: Count
    step: Count
    samples: Count
    updates: Count
    identity: dict[str, Any]
    files: dict[str, FileMeta]
    tensors: dict[str, TensorMeta]


def encode_meta(meta: Meta) -> bytes:
    """Return the bytes of ``meta.json``."""
    rows = (
        f'"{name}": '.encode() + msgspec.json.encode(getattr(meta, name))
        for name in meta.__struct_fields__
    )
    body = b"{\n" + b",\n".join(rows)
    return body + f',\n"crc32": {zlib.crc32(body)}\n}}\n'.encode()


def decode_meta(data: bytes, path: Any) -> Meta:
    """Return the content of ``meta.json``. The identity of an older version gets today's names.
    Raises UserError for a damaged file, and for one that contradicts itself.

    ``path``: the place of the checkpoint, of a disk or of an object store."""
    where = f"{path / META}"
    head = _HEAD.match(data)
    if head and int(head[1]) != FORMAT:
        remedy = (
            f"convert it with `python -m dtron.checkpoint convert {path.parent.parent}`"
            if int(head[1]) == FORMAT - 1
            else "use the version that wrote it"
        )
        raise UserError(f"{path}: format {int(head[1])}, this version reads {FORMAT}; {remedy}")
    tail = _TAIL.search(data)
    if not tail or zlib.crc32(data[: tail.start()]) != int(tail[1]):
        raise UserError(f"{where}: no readable checkpoint: its checksum is another; {REMEDY}")
    meta = decode(data[: tail.start()] + b"}", Meta, where, REMEDY)
    for name in meta.files:
        if name in ("", ".", "..", META) or Path(name).name != name:
            raise UserError(
                f"{where}: lists the file {name!r}, which is not in its folder; {REMEDY}"
            )
    for name, tensor in meta.tensors.items():
        for part in tensor.parts:
            fits = part.file in meta.files and len(part.start) == len(part.shape)
            ends = zip(tensor.shape, part.start, part.shape, strict=False)
            if (
                not fits
                or len(part.start) != len(tensor.shape)
                or any(a + n > m for m, a, n in ends)
            ):
                raise UserError(f"{where}: {name} has a part that does not fit: {part}; {REMEDY}")
    return msgspec.structs.replace(meta, identity=current(meta.identity))


def parse_head(data: bytes) -> tuple[int, int] | None:
    """Return format and step of a checkpoint by the first ``HEAD_BYTES`` bytes of its
    ``meta.json``. None: they are no such bytes."""
    head = _HEAD.match(data)
    return (int(head[1]), int(head[2])) if head else None
