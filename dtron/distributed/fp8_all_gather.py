"""All-gather of weights in 8 bits: half the bytes of a bfloat16 all-gather, the same FP8 matmuls.

An FP8 matmul rounds its weight to e4m3 under a scale. If the weight is rounded before its
all-gather, one byte is sent instead of two. A rank that rounds sees its own shard of the weight
only. But where scales are powers of two (see fp8/scaled_mm.py), a value rounds alike under any
scale, except for values so small that they leave the format's range. So each row of a shard has its
own scale, the finest that a message has room for. The receiver unpacks a bfloat16 weight whose
values FP8 can already represent. Rounding this weight again changes nothing, whatever the scale of
the recipe, along rows or along columns. So the recipes need not know of the 8-bit all-gather.

A message is a row of bytes: the values, then the exponent of each row's scale. (torchao's FP8
all-gather has one scale for the whole weight, from an all-reduce of maxima after each update.
torchao has it for the tensorwise recipe only.)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LARGEST = 448.0  # the largest value of e4m3
TINY = 2.0**-100  # lower bound of a row's maximum, so that its scale does not overflow


def packed(x: Tensor) -> Tensor:
    """Pack ``x [..., n]`` from high precision into bytes: the values, then one exponent for each
    row of n values."""
    largest = x.abs().amax(-1, keepdim=True).float().clamp(min=TINY)
    # The exponent bits of a float are floor(log2) + 127. The sign bit is 0 here.
    exponent = (LARGEST / largest).view(torch.int32) >> 23
    # Clamped, because the cast of torch 2.11 does not saturate.
    values = (x.float() * _power(exponent)).clamp(-LARGEST, LARGEST)
    values = values.to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.cat([values.flatten(), exponent.to(torch.uint8).flatten()])


def unpacked(messages: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Unpack messages of tensors of one shape: ``[..., bytes]`` -> ``[..., *shape]``."""
    rows = torch.Size(shape[:-1])
    values, exponent = messages.split([rows.numel() * shape[-1], rows.numel()], -1)
    values = values.view(torch.float8_e4m3fn).unflatten(-1, shape).float()
    scale = _power(254 - exponent.to(torch.int32)).unflatten(-1, rows).unsqueeze(-1)  # 1 / scale
    return (values * scale).to(dtype)


class Unpack(torch.autograd.Function):
    """Unpack a whole weight from the messages of all ranks along one mesh axis. The gradient of the
    weight is passed to ``carrier``, because bytes have no gradient.

    ``carrier``: a tensor of the weight's shape and dtype. Its values are not read.
    ``shape``: the shape of a rank's shard.
    ``dim``: the dim that the axis shards."""

    @staticmethod
    def forward(
        ctx: Any, messages: Tensor, carrier: Tensor, shape: Sequence[int], dim: int
    ) -> Tensor:
        return unpacked(messages, shape, carrier.dtype).movedim(0, dim).flatten(dim, dim + 1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return None, g, None, None


def _power(exponent: Tensor) -> Tensor:
    """Return 2 to the power of ``exponent - 127``, as float32."""
    return (exponent << 23).view(torch.float32)
