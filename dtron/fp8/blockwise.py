"""One scale per 128 values of an activation and per 128 x 128 block of a weight: DeepSeek-V3's
recipe (arXiv:2412.19437, section 3.3 and figure 7).

A scale for a whole row is set by the row's largest value. With one scale per 128 values, an
outlier costs precision only in its own block. All three matmuls follow one rule. The contracted dim
is split into blocks of 128, and within a block each row of the left operand has its own scale. For
the right operand there are two cases. A weight's columns share scales in groups of 128 (forward,
and backward to the input). Each column of a gradient has its own scale (backward to the weight).

The kernel is cuBLAS's. It is called through the operator below ``F.scaled_mm``: ``F.scaled_mm`` is
public, but torch 2.11 cannot trace its internals. Casts are plain arithmetic, which a compiler
fuses with the surrounding operations. (torchao has Triton kernels for the same casts, for weights
stored transposed.)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dtron.fp8.recipe import Role
from dtron.fp8.torchao_recipe import TorchaoRecipe
from dtron.torch_compile import kernel_device

BLOCK = 128  # values that share a scale


class Blocks(NamedTuple):
    """A cast operand.

    ``values``: float8, ``[rows, K]`` with the contracted dim last. A right operand is transposed.
    ``scale``: the factor of the values, one for each block: ``[rows, K / 128]``, or ``[rows / 128,
        K / 128]`` of a weight.
    ``squares``: whether blocks are 128 x 128."""

    values: Tensor
    scale: Tensor
    squares: bool

    def wide(self) -> Tensor:
        """Return the values in float32, divided by their scales."""
        scale = self.scale.repeat_interleave(BLOCK, 0) if self.squares else self.scale
        return self.values.float() / scale.repeat_interleave(BLOCK, 1)


@dataclass(frozen=True)
class Blockwise(TorchaoRecipe):
    """The recipe, with torchao's rule for a block's scale. Experts are multiplied as under
    torchao's recipes: their kernel supports no scales of blocks."""

    multiple = BLOCK

    def cast(self, x: Tensor, dim: int, role: Role) -> Blocks:
        x = x if dim == 1 else x.t()
        squares = role in ("weight", "weight_for_grad_input")
        return Blocks(*(_squares(x) if squares else _lines(x)), squares)

    def mm(self, a: Blocks, b: Blocks, dtype: torch.dtype) -> Tensor:
        if kernel_device(a.values.device) == "cpu":
            return (a.wide() @ b.wide().t()).to(dtype)
        lines, squares = F.ScalingType.BlockWise1x128.value, F.ScalingType.BlockWise128x128.value
        # The kernel needs rows of a and columns of b contiguous, and scales transposed in memory.
        b_scale = b.scale.reciprocal()
        b_scale = _padded(b_scale).t() if b.squares else _columns(b_scale)
        return torch.ops.aten._scaled_mm_v2(
            a.values.contiguous(),
            b.values.contiguous().t(),
            [_columns(a.scale.reciprocal())],
            [lines],
            [],
            [b_scale],
            [squares if b.squares else lines],
            [],
            None,
            dtype,
        )


def _lines(x: Tensor) -> tuple[Tensor, Tensor]:
    values, scale = _scaled(x.unflatten(1, (-1, BLOCK)))
    return values.flatten(1), scale.squeeze(2)


def _squares(x: Tensor) -> tuple[Tensor, Tensor]:
    squares = x.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).transpose(1, 2)
    values, scale = _scaled(squares.flatten(2))
    values = values.unflatten(2, (BLOCK, BLOCK)).transpose(1, 2)
    return values.flatten(2).flatten(0, 1), scale.squeeze(2)


def _scaled(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Cast blocks, each one a row of the last dim."""
    from dtron.fp8.scaled_mm import scaled_by  # imports torchao

    return scaled_by(blocks, 2)


def _columns(scale: Tensor) -> Tensor:
    return scale.t().contiguous().t()


def _padded(scale: Tensor) -> Tensor:
    """Pad scales to a multiple of 4 along the contracted dim, as cuBLAS reads them."""
    return F.pad(scale, (0, -scale.shape[1] % 4), value=1.0)
