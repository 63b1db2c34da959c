"""Quantised weights of a Hugging Face folder, dequantised as they are read.

Two formats of published models, of which config.json has the ``quant_method``:

``fp8`` (DeepSeek-V3). A matrix ``X`` has 8 bits a value (float8_e4m3). ``X_scale_inv`` has one
scale for each block of 128 x 128 values (``weight_block_size``), or one scale for the whole matrix.
The weight is value times scale (DeepSeek-V3, arXiv:2412.19437, section 3.3.2).

``mxfp4`` (gpt-oss). A weight ``X`` has 4 bits a value, two values a byte, the low bits first.
``X_scales`` has an exponent for each block of 32 values; the scale is ``2 ** (exponent - 127)``
(OCP Microscaling Formats, version 1.0, sections 5.2 and 5.3). ``X_blocks`` is ``[experts, columns,
blocks, 16]``, and the weight ``[experts, 32 * blocks, columns]``.

``Dequantizer`` has the tensors of a folder as if they were not quantised. A rank reads only the
blocks that overlap its box. The result is float32, so no bit of a value is lost.

Left out: every other method. Export writes plain weights, because a trained weight is no longer a
value of its old block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dtron.checkpoint.safetensors import Entry
from dtron.checkpoint.shard_range import Range
from dtron.errors import UserError
from dtron.hf.weight_files import Reader

METHODS = ("fp8", "mxfp4")
_FP8 = ("F8_E4M3", "F8_E5M2")
_MX_BLOCK = 32  # values of one exponent
# The values of 4 bits: a sign, two bits of exponent, one of mantissa.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4_VALUES = (*_FP4, *(-value for value in _FP4))


class Dequantizer:
    """A reader of a folder whose quantised tensors look like plain ones.

    ``entries``: the plain tensors by name. A quantised weight has its dequantised shape."""

    def __init__(self, reader: Reader, quantization: Mapping[str, Any]) -> None:
        """Find the quantised tensors. Raises UserError if scales are missing or have another
        shape."""
        self.reader = reader
        self._quantised: dict[str, _BlockScaled | _MXFP4] = {}
        self.entries: dict[str, Entry] = {}
        block = quantization.get("weight_block_size")
        have = reader.entries
        scales = set()
        for name, entry in have.items():
            if entry.dtype in _FP8:
                scale = name + "_scale_inv"
                found = _block_scaled(name, scale, reader, block)
            elif name.endswith("_blocks") and entry.dtype == "U8":
                name, scale = name.removesuffix("_blocks"), name.removesuffix("_blocks") + "_scales"
                found = _mxfp4(name, scale, reader)
            else:
                self.entries[name] = entry
                continue
            scales.add(scale)
            self._quantised[name] = found
            self.entries[name] = replace(entry, dtype="F32", shape=found.shape)
        for name in list(self.entries):
            if name in scales or name.endswith((".activation_scale", ".input_scale")):
                del self.entries[name]

    @property
    def bytes_read(self) -> int:
        return self.reader.bytes_read

    def read(self, name: str, box: Sequence[Range] | None = None) -> Tensor:
        """Return the slice of a tensor inside ``box``; see ``Reader.read``."""
        found = self._quantised.get(name)
        if found is None:
            return self.reader.read(name, box)
        return found.read(self.reader, [(0, n) for n in found.shape] if box is None else list(box))

    def close(self) -> None:
        self.reader.close()


@dataclass(frozen=True)
class _BlockScaled:
    """A weight in float8 whose last two dims have blocks with one scale each."""

    weight: str
    scale: str
    shape: tuple[int, ...]
    block: tuple[int, int]

    def read(self, reader: Reader, box: list[Range]) -> Tensor:
        x = reader.read_stored(self.weight, box).float()
        if not x.numel():
            return x
        stored = reader.entries[self.scale].shape
        if math.prod(stored) == 1:
            return x * _factors(reader.read_stored(self.scale)).reshape(())
        rows, columns = (_blocks_of(r, size) for r, size in zip(box[-2:], self.block, strict=True))
        scale = _factors(reader.read_stored(self.scale, [*box[:-2], rows, columns]))
        for dim, size, (a, b) in zip((-2, -1), self.block, box[-2:], strict=True):
            index = torch.arange(a, b) // size - a // size
            scale = scale.index_select(dim, index)
        return x * scale


def _block_scaled(
    weight: str, scale: str, reader: Reader, block: Sequence[int] | None
) -> _BlockScaled:
    entry, found = reader.entries[weight], reader.entries.get(scale)
    if found is None:
        raise UserError(
            f"{entry.file}: {weight} is {entry.dtype}, and {scale} is not in the folder"
        )
    shape, grid = entry.shape, found.shape
    if math.prod(grid) == 1:
        return _BlockScaled(weight, scale, shape, (1, 1))
    if len(shape) < 2 or len(grid) != len(shape) or grid[:-2] != shape[:-2]:
        raise UserError(f"{entry.file}: {scale} is {list(grid)} for {weight} of {list(shape)}")
    # A folder may have weights with other blocks than weight_block_size. Then the scales tell the
    # size of a block, if it divides the weight.
    even = tuple(n // g if g and n % g == 0 else 0 for n, g in zip(shape[-2:], grid[-2:]))
    for size in (tuple(map(int, block or (0, 0))), even):
        if min(size) > 0 and grid[-2:] == tuple(-(-n // b) for n, b in zip(shape[-2:], size)):
            return _BlockScaled(weight, scale, shape, (size[0], size[1]))
    raise UserError(
        f"{entry.file}: {scale} is {list(grid)} for {weight} of {list(shape)}, and "
        f"weight_block_size is {block}; they are not of one model"
    )


def _factors(scale: Tensor) -> Tensor:
    """Return scales as float32. A byte is an exponent with bias 127."""
    return torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()


@dataclass(frozen=True)
class _MXFP4:
    """A weight in blocks of 32 values of 4 bits. The dims of the stored tensor are experts,
    columns, blocks and bytes."""

    name: str
    shape: tuple[int, ...]

    def read(self, reader: Reader, box: list[Range]) -> Tensor:
        experts, rows, columns = box
        if any(b <= a for a, b in box):
            return torch.zeros([b - a for a, b in box])
        blocks = _blocks_of(rows, _MX_BLOCK)
        stored = reader.read_stored(
            self.name + "_blocks", [experts, columns, blocks, (0, _MX_BLOCK // 2)]
        )
        exponent = reader.read_stored(self.name + "_scales", [experts, columns, blocks])
        values = torch.tensor(_FP4_VALUES)
        both = torch.stack([values[(stored & 15).long()], values[(stored >> 4).long()]], dim=-1)
        x = both.flatten(-2) * _factors(exponent).unsqueeze(-1)
        start = blocks[0] * _MX_BLOCK
        x = x.flatten(-2)[..., rows[0] - start : rows[1] - start]
        return x.transpose(-2, -1).contiguous()


def _mxfp4(name: str, scale: str, reader: Reader) -> _MXFP4:
    blocks, scales = reader.entries[name + "_blocks"], reader.entries.get(scale)
    if scales is None:
        raise UserError(f"{blocks.file}: {name}_blocks has no {scale} in the folder")
    shape = blocks.shape
    if len(shape) != 4 or shape[-1] != _MX_BLOCK // 2 or scales.shape != shape[:-1]:
        raise UserError(
            f"{blocks.file}: {name}_blocks is {list(shape)} and {scale} {list(scales.shape)}; they "
            "must be [experts, columns, blocks, 16] and [experts, columns, blocks]"
        )
    return _MXFP4(name, (shape[0], shape[2] * _MX_BLOCK, shape[1]))


def _blocks_of(values: Range, size: int) -> Range:
    """Return the range of the blocks that overlap a range of values."""
    return values[0] // size, -(-values[1] // size)
