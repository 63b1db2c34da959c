"""The safetensors format, read by byte ranges.

A file is eight bytes (the length of the header, little-endian), the header, and the concatenated
bytes of the tensors. The header is JSON: for each tensor its dtype, its shape, and the begin and
end of its bytes. Nothing in a file can be executed, which is the purpose of the format. A pickled
checkpoint is refused.

The ``safetensors`` library reads slices through a memory map, so the number of bytes read is
unknown. Here a rank reads with ``pread`` exactly the contiguous runs of bytes of its shard, and
counts them. safetensors_writer.py writes the format.

A checkpoint of several files has an index, ``model.safetensors.index.json``, that names the file of
each tensor.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtron.checkpoint.shard_range import Range
from dtron.errors import UserError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# The dtypes of quantised weights and their scales; dequantize.py makes weights of them.
_STORED = DTYPES | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
}
_BYTES = {
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
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
                f"{entry.file}: {name} is {entry.dtype}, a quantised or integer tensor, and "
                f"config.json has no quantization_config that explains it; weights are "
                f"{', '.join(DTYPES)}"
            )
        return self.read_stored(name, box)

    def read_stored(self, name: str, box: Sequence[Range] | None = None) -> Tensor:
        """Return the slice of a tensor inside ``box`` as it is stored, which may be quantised."""
        entry = self.entries[name]
        box = [(0, n) for n in entry.shape] if box is None else list(box)
        out = torch.empty([b - a for a, b in box], dtype=_STORED[entry.dtype])
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

    def rename(self, names: Mapping[str, str]) -> None:
        """Give tensors new names, by the old names."""
        self.entries = {names.get(name, name): entry for name, entry in self.entries.items()}

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
    """Return the tensors of a folder: of the single file if there is one, as transformers does, and
    otherwise of all files that the index names."""
    index, single = folder / INDEX, folder / SINGLE
    if single.is_file():
        return header(single)
    if index.is_file():
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not all(
            isinstance(f, str) and _plain(f) for f in where.values()
        ):
            raise UserError(
                f"{index}: has no weight_map from tensors to files beside it; write the index again"
            )
        names = sorted(set(where.values()))
        absent = [name for name in names if not (folder / name).is_file()]
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


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError if the file has none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); mend the file") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: is JSON but no object; mend the file")
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
        raise UserError(f"{path}: cannot be read ({error.strerror}); make it readable") from error
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        base = 8 + length
        found = {name: _entry(path, base, one) for name, one in entries.items()}
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: its {size} bytes are no safetensors file, or one that was cut short; copy the "
            "file again from its source"
        ) from error
    for name, e in found.items():
        wide = DTYPES[e.dtype].itemsize if e.dtype in DTYPES else _BYTES.get(e.dtype)
        if wide is not None and e.stop - e.start != wide * math.prod(e.shape):
            raise UserError(
                f"{path}: {name} is {e.dtype} {list(e.shape)}, and has {e.stop - e.start} bytes; "
                "the program that wrote the file made an error"
            )
    end = max((e.stop for e in found.values()), default=base)
    if end > size:
        raise UserError(
            f"{path}: has {size} of {end} bytes, it was cut short; copy the file again from its source"
        )
    return found


def _entry(path: Path, base: int, entries: Mapping[str, Any]) -> Entry:
    (begin, end), shape = entries["data_offsets"], tuple(entries["shape"])
    if not all(isinstance(n, int) and n >= 0 for n in (begin, end, *shape)) or begin > end:
        raise UserError("not sizes")
    return Entry(path, str(entries["dtype"]), shape, base + begin, base + end)
