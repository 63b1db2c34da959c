"""The safetensors format, read by byte ranges and written as a stream.

A file is eight bytes (the length of the header, little-endian), the header, and the concatenated
bytes of the tensors. The header is JSON: for each tensor its dtype, its shape, and the begin and
end of its bytes. Nothing in a file can be executed, which is the purpose of the format. A pickled
checkpoint is refused.

The ``safetensors`` library has two limits that this module avoids. It writes a file only if all
tensors of the file are in memory; here tensors are written one at a time, as they are made. It
reads slices through a memory map, so the number of bytes read is unknown; here a rank reads with
``pread`` exactly the contiguous runs of bytes of its shard, and counts them.

A checkpoint of several files has an index, ``model.safetensors.index.json``, that names the file of
each tensor.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtron.checkpoint.shard_range import Range
from dtron.errors import UserError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BYTES = {"F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_LARGEST_HEADER = 100_000_000  # bytes; the library has the same limit
_ONE_READ = 1 << 30  # Linux reads at most 2 GiB at a time


@dataclass(frozen=True)
class Entry:
    """A tensor in a file. Its bytes are ``start`` to ``stop``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Reader:
    """The tensors of a folder, by name. Raises UserError for a folder without safetensors, and for
    files that are damaged or incomplete.

    ``bytes_read``: counts the bytes that ``read`` has read from the files."""

    def __init__(self, folder: Path):
        self.folder, self.bytes_read = folder, 0
        self.entries = _entries(folder)
        self._open: dict[Path, int] = {}

    def read(self, name: str, box: Sequence[Range] | None = None) -> Tensor:
        """Return the slice of a tensor inside ``box``, one range per dim (None: the whole tensor),
        in the file's dtype."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise UserError(
                f"{entry.file}: {name} is {entry.dtype}, a quantised or integer tensor; weights "
                f"must be {', '.join(DTYPES)}: give a checkpoint that is not quantised"
            )
        box = [(0, n) for n in entry.shape] if box is None else list(box)
        out = torch.empty([b - a for a, b in box], dtype=DTYPES[entry.dtype])
        if out.numel():
            memory = out.view(-1).view(torch.uint8).numpy().data
            size, filled = out.element_size(), 0
            for first, count in _runs(entry.shape, box):
                part = memory[filled : filled + count * size]
                self._fill(entry, part, entry.start + first * size)
                filled += count * size
        return out

    def _fill(self, entry: Entry, memory: memoryview, offset: int) -> None:
        if entry.file not in self._open:
            self._open[entry.file] = os.open(entry.file, os.O_RDONLY)
        done = 0
        while done < len(memory):
            n = os.preadv(self._open[entry.file], [memory[done : done + _ONE_READ]], offset + done)
            if not n:
                raise UserError(
                    f"{entry.file}: ends early; it was changed while it was read, start again"
                )
            done += n
        self.bytes_read += done

    def close(self) -> None:
        for handle in self._open.values():
            os.close(handle)
        self._open.clear()


def _runs(shape: Sequence[int], box: Sequence[Range]) -> Iterator[tuple[int, int]]:
    """Yield ``(first, count)`` for each contiguous run of the elements inside a box, in order."""
    if not shape:
        yield 0, 1
        return
    # The dims from ``inner`` on are contiguous in the box: the last dims whose range is the whole
    # dim, and the dim before them.
    inner = len(shape) - 1
    while inner and box[inner] == (0, shape[inner]):
        inner -= 1
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    count = math.prod(b - a for a, b in box[inner:])
    start = box[inner][0] * strides[inner]
    for outer in product(*(range(a, b) for a, b in box[:inner])):
        yield start + sum(i * stride for i, stride in zip(outer, strides)), count


def _entries(folder: Path) -> dict[str, Entry]:
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file():
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not all(
            isinstance(f, str) and _plain(f) for f in where.values()
        ):
            raise UserError(
                f"{index}: has no weight_map from tensors to files beside it; download it again"
            )
        files = {name: header(folder / name) for name in sorted(set(where.values()))}
        for name, file in where.items():
            if name not in files[file]:
                raise UserError(f"{folder / file}: {index.name} says it has {name}, and it has not")
        extra = [(n, f) for f, names in files.items() for n in names if where.get(n) != f]
        if extra:
            raise UserError(
                f"{folder / extra[0][1]}: has {extra[0][0]}, which {index.name} does not name"
            )
        return {name: files[file][name] for name, file in where.items()}
    if single.is_file():
        return header(single)
    pickled = next(
        (f.name for p in ("*.bin", "*.pt", "*.pth", "*.ckpt") for f in folder.glob(p)), None
    )
    if pickled:
        raise UserError(
            f"{folder}: has {pickled}, a pickle, which can run any code when it is read; dtron "
            "reads safetensors only: convert it"
        )
    raise UserError(f"{folder}: no {SINGLE} and no {INDEX} in it; give the folder of a model")


def _plain(name: str) -> bool:
    return bool(name) and Path(name).name == name


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError if the file has none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: is JSON but no object; download it again")
    return value


def header(path: Path) -> dict[str, Entry]:
    """Return the entries of a file, checked against the file's size. Raises UserError for a file
    that is not in safetensors format or is truncated."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= min(_LARGEST_HEADER, size - 8) else b""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); download it again") from error
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        base = 8 + length
        found = {name: _entry(path, base, one) for name, one in entries.items()}
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: is no safetensors file, or was cut short; download it again"
        ) from error
    for name, e in found.items():
        wide = DTYPES[e.dtype].itemsize if e.dtype in DTYPES else _BYTES.get(e.dtype)
        if wide is not None and e.stop - e.start != wide * math.prod(e.shape):
            raise UserError(
                f"{path}: {name} is {e.dtype} {list(e.shape)}, and has {e.stop - e.start} bytes; "
                "download it again"
            )
    end = max((e.stop for e in found.values()), default=base)
    if end > size:
        raise UserError(f"{path}: has {size} of {end} bytes, it was cut short; download it again")
    return found


def _entry(path: Path, base: int, entries: Mapping[str, Any]) -> Entry:
    (begin, end), shape = entries["data_offsets"], tuple(entries["shape"])
    if not all(isinstance(n, int) and n >= 0 for n in (begin, end, *shape)) or begin > end:
        raise UserError("not sizes")
    return Entry(path, str(entries["dtype"]), shape, base + begin, base + end)


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
