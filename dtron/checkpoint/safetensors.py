"""The safetensors format, read by byte ranges.

A file is eight bytes (the length of the header, little-endian), the header, and the concatenated
bytes of the tensors. The header is JSON: for each tensor its dtype, its shape, and the begin and
end of its bytes. Nothing in a file can be executed, which is the purpose of the format. A pickled
checkpoint is refused.

The ``safetensors`` library reads slices through a memory map, so the number of bytes read is
unknown. Here a rank reads exactly the contiguous runs of bytes of its shard, and counts them. The
file may be in an object store (storage.py). safetensors_writer.py writes the format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from dtron.checkpoint.shard_range import Range
from dtron.checkpoint.storage import AnyPath, OpenFile, open_file
from dtron.errors import UserError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# The other dtypes: quantised weights and their scales, and states in integers.
STORED = DTYPES | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LARGEST_HEADER = 100_000_000  # bytes; the library has the same limit


@dataclass(frozen=True)
class Entry:
    """A tensor in a file. Its bytes are ``start`` to ``stop``."""

    file: AnyPath
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorReader:
    """Tensors of one or several files, by name.

    ``entries``: the tensors.
    ``follow``: whether a file may be a symbolic link.
    ``bytes_read``: counts the bytes that ``read`` has read from the files."""

    def __init__(self, entries: dict[str, Entry], *, follow: bool = True):
        self.entries, self.bytes_read, self._follow = entries, 0, follow
        self._open: dict[AnyPath, OpenFile] = {}

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

    def read_stored(
        self, name: str, box: Sequence[Range] | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Return the slice of a tensor inside ``box`` as it is stored, which may be quantised.

        ``out``: contiguous memory on the CPU to read into, of the slice's shape and the stored
        dtype (None: new memory)."""
        entry = self.entries[name]
        if entry.dtype not in STORED:
            raise UserError(f"{entry.file}: {name} is {entry.dtype}, a dtype that dtron has not")
        box = [(0, n) for n in entry.shape] if box is None else list(box)
        if out is None:
            out = torch.empty([b - a for a, b in box], dtype=STORED[entry.dtype])
        if out.numel():
            memory = out.view(-1).view(torch.uint8).numpy().data
            size, filled = out.element_size(), 0
            ranges = []
            for first, count in _runs(entry.shape, box):
                part = memory[filled : filled + count * size]
                ranges.append((entry.start + first * size, part))
                filled += count * size
            self._fill(entry, ranges)
            self.bytes_read += filled
        return out

    def _fill(self, entry: Entry, ranges: Sequence[tuple[int, memoryview]]) -> None:
        try:
            if entry.file not in self._open:
                self._open[entry.file] = open_file(entry.file, follow=self._follow)
            self._open[entry.file].read_ranges(ranges)
        except OSError as error:
            raise UserError(
                f"{entry.file}: cannot be read ({error.strerror}); make it readable"
            ) from error

    def rename(self, names: Mapping[str, str]) -> None:
        """Give tensors new names, by the old names."""
        self.entries = {names.get(name, name): entry for name, entry in self.entries.items()}

    def close(self) -> None:
        for handle in self._open.values():
            handle.close()
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


def header(path: AnyPath, *, follow: bool = True) -> dict[str, Entry]:
    """Return the entries of a file, checked against the file's size. Raises UserError for a file
    that is not in safetensors format or is truncated.

    ``follow``: whether the file may be a symbolic link."""
    try:
        with closing(open_file(path, follow=follow)) as file:
            size = file.size
            length = int.from_bytes(_read(file, 0, min(8, size)), "little")
            fits = length <= min(_LARGEST_HEADER, size - 8)
            text = _read(file, 8, length) if fits else b""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make it readable") from error
    base = 8 + length
    try:
        found = {
            name: _entry(path, base, one)
            for name, one in json.loads(text, object_pairs_hook=_object).items()
            if name != "__metadata__"
        }
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: its {size} bytes are no safetensors file, or one that was cut short; copy "
            "the file again from its source"
        ) from error
    last = base
    for name, e in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if e.dtype in STORED and e.stop - e.start != STORED[e.dtype].itemsize * math.prod(e.shape):
            raise UserError(
                f"{path}: {name} is {e.dtype} {list(e.shape)}, and has {e.stop - e.start} bytes; "
                "the program that wrote the file made an error"
            )
        if e.start < last:
            raise UserError(
                f"{path}: {name} begins at byte {e.start}, inside another tensor; the program that "
                "wrote the file made an error"
            )
        last = max(last, e.stop)
    if last > size:
        raise UserError(
            f"{path}: has {size} of {last} bytes, it was cut short; copy the file again from its "
            "source"
        )
    return found


def _read(file: OpenFile, offset: int, count: int) -> bytearray:
    data = bytearray(count)
    file.read_ranges([(offset, memoryview(data))])
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object. Two equal keys are an error: each program would take another one."""
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name is there twice")
    return out


def _entry(path: AnyPath, base: int, entries: Mapping[str, Any]) -> Entry:
    (begin, end), shape = entries["data_offsets"], tuple(entries["shape"])
    numbers = (begin, end, *shape)
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers) or begin > end:
        raise ValueError("not sizes")
    return Entry(path, str(entries["dtype"]), shape, base + begin, base + end)
