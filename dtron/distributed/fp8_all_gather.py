"""Weights sent in 8 bits: half the bytes of a gather in bfloat16, and the same products in FP8.

A product in FP8 rounds its weight to e4m3 under a scale. If that is done before the weight is
gathered, a byte goes where two did. Who rounds sees a part of the weight only, but where scales are
powers of two (see fp8/scaled_mm.py) a value rounds alike under any of them, but for those so small
that they leave the format's range. So each row of a part has a scale of its own, the finest that a
message has room for, and what arrives is a weight in bfloat16 again whose values FP8 has already:
rounding it once more, under whatever scale a recipe wants and in whichever direction, changes
nothing. The recipes need not know.

A message is a row of bytes: the values, and after them the exponent of each row's scale. (torchao's
gather in FP8 has one scale for the whole weight, from an all-reduce of largest values after each
update, and is for its tensorwise recipe.)"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST = 448.0  # of e4m3
TINY = 2.0**-100  # rows of nothing larger have a scale that does not overflow


def packed(x: Tensor) -> Tensor:
    """``x [..., n]`` in high precision -> bytes: its values, then an exponent for each of its rows
    of n."""
    largest = x.abs().amax(-1, keepdim=True).float().clamp(min=TINY)
    exponent = (LARGEST / largest).view(
        torch.int32
    ) >> 23  # a float's bits: floor(log2) + 127, and no sign
    values = (x.float() * _power(exponent)).clamp(
        -LARGEST, LARGEST
    )  # a cast of torch 2.11 does not saturate
    values = values.to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.cat([values.flatten(), exponent.to(torch.uint8).flatten()])


def unpacked(messages: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Messages of tensors of one shape, ``[..., bytes]`` -> ``[..., *shape]``."""
    rows = torch.Size(shape[:-1])
    values, exponent = messages.split([rows.numel() * shape[-1], rows.numel()], -1)
    values = values.view(torch.float8_e4m3fn).unflatten(-1, shape).float()
    scale = _power(254 - exponent.to(torch.int32)).unflatten(-1, rows).unsqueeze(-1)  # one over it
    return (values * scale).to(dtype)


def _power(exponent: Tensor) -> Tensor:
    """2 to the power of ``exponent - 127``, as float32."""
    return (exponent << 23).view(torch.float32)
