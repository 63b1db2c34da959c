"""Frozen weights in 4 or 8 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

A weight is cut into blocks of 64 along its last axis. A block has one scale, its largest absolute
value, and a code for each element:

- ``nf4``: 4 bits, an index of 16 values between -1 and 1. They are quantiles of the normal
  distribution (section 3 and appendix E), so each code is used equally often if the weights are
  normal. Two codes are in one byte.
- ``fp8``: 8 bits, a float8 number (e4m3) between -448 and 448.

Codes and scales are two tensors on the axes of the weight, so the rules shard them like the weight,
and ZeRO-3 all-gathers codes: a quarter or half of the bytes. A matmul makes the weight from its
codes in the compute dtype when it needs it, and backward makes it again.

Left out: scales in 8 bits with scales of their own (double quantisation, section 3). It would save
0.2 bits of 4.25 with scales in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import local_map

from dtron.layers.recompute import recompute_in_backward
from dtron.params import value
from dtron.tree import Adapted, Declared

BLOCK = 64
Format = Literal["nf4", "fp8"]

# Quantiles of the normal distribution, divided by the largest (appendix E).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
LARGEST_FP8 = 448.0


@dataclass(frozen=True)
class QuantizedWeight(Adapted):
    """A frozen weight in few bits.

    ``base``: the codes, as bytes: ``[*axes, last / 2]`` in nf4, ``[*axes, last]`` in fp8.
    ``scales``: ``[*axes, last / 64]``, in the compute dtype.
    ``format``: ``nf4`` or ``fp8``."""

    base: Tensor
    scales: Tensor
    format: str = value("format")

    def split_axes(self, axes: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        return [axes, axes]

    def declared(self, whole: Declared) -> list[Declared]:
        return super().declared(replace(whole, summed=0))  # no matmul takes codes

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight."""
        *ahead, last = self.base.shape
        return torch.Size((*ahead, last * codes_per_byte(self.format)))

    def filled(self, load: Callable[[Any], Any]) -> QuantizedWeight:
        """Load the weight that the codes stand for, and store it."""
        spec: Any = self.base
        w, store = (
            load(replace(spec, shape=tuple(self.shape), dtype=None)),
            partial(quantize, format=self.format),
        )
        if isinstance(w, DTensor):
            store = local_map(
                store,
                out_placements=(list(w.placements),) * 2,
                in_placements=(w.placements,),
                device_mesh=w.device_mesh,
            )
        codes, scales = store(w)
        return QuantizedWeight(codes, scales, self.format)

    def dense(self) -> Tensor:
        """Return the weight, in the dtype of the scales. Each rank makes its own shard."""

        def make(codes: Tensor, scales: Tensor) -> tuple[Tensor]:
            return (dequantize(codes, scales, self.format),)

        def local(codes: Tensor, scales: Tensor) -> Tensor:
            return recompute_in_backward(make, codes, scales)[0]

        if not isinstance(self.base, DTensor):
            return local(self.base, self.scales)
        placements = self.base.placements
        return local_map(
            local,
            out_placements=list(placements),
            in_placements=(placements, placements),
            device_mesh=self.base.device_mesh,
        )(self.base, self.scales)


def codes_per_byte(format: str) -> int:
    """Return the number of codes in a byte."""
    return 2 if format == "nf4" else 1


def quantize(w: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Return codes and scales of a weight, or of a rank's shard. The last dim is a multiple of 64.
    Scales have the dtype of ``w``."""
    blocks = w.float().unflatten(-1, (-1, BLOCK))
    scales = blocks.abs().amax(-1).to(w.dtype)
    unit = (blocks / scales.float().clamp(min=torch.finfo(torch.float32).tiny)[..., None]).flatten(
        -2
    )
    if format == "fp8":
        codes = (unit * LARGEST_FP8).clamp(-LARGEST_FP8, LARGEST_FP8)
        return codes.to(torch.float8_e4m3fn).view(torch.uint8), scales
    codes = torch.zeros_like(unit, dtype=torch.uint8)
    for low, high in pairwise(NF4):
        codes += unit > (low + high) / 2
    pairs = codes.unflatten(-1, (-1, 2))
    return pairs[..., 0] * 16 + pairs[..., 1], scales


def dequantize(codes: Tensor, scales: Tensor, format: str) -> Tensor:
    """Undo ``quantize``, up to rounding, in the dtype of the scales."""
    if format == "fp8":
        unit = codes.view(torch.float8_e4m3fn).to(scales.dtype) / LARGEST_FP8
    else:
        index = torch.stack((codes >> 4, codes & 15), -1).flatten(-2)
        unit = _level(index, NF4, 8).to(scales.dtype)
    return (unit.unflatten(-1, (-1, BLOCK)) * scales[..., None]).flatten(-2)


def _level(codes: Tensor, levels: Sequence[float], bit: int) -> Tensor:
    """Return the level of each code, chosen bit by bit. There is no table on the device, so one
    kernel makes the weight, and a recorded step copies nothing to the device.

    ``bit``: the highest bit of the codes."""
    half = len(levels) // 2
    low: Any = levels[0] if half == 1 else _level(codes, levels[:half], bit // 2)
    high: Any = levels[1] if half == 1 else _level(codes, levels[half:], bit // 2)
    return torch.where((codes & bit) > 0, high, low)


def declare_quantized(w: Any, format: str) -> Any:
    """Return the declarations of codes and scales of a weight.

    ``w``: its ``WeightSpec``."""
    *ahead, last = w.shape
    frozen = replace(w, frozen=True, summed=0)
    codes = replace(frozen, shape=(*ahead, last // codes_per_byte(format)), dtype=torch.uint8)
    scales = replace(frozen, path=f"{w.path}.scales", shape=(*ahead, last // BLOCK))
    leaves: Any = {"base": codes, "scales": scales}
    return QuantizedWeight(**leaves, format=format)


def dense(w: Any) -> Tensor:
    """Return a weight that may be in few bits as a tensor."""
    return w.dense() if isinstance(w, QuantizedWeight) else w
