"""Matmuls with one scale per 128 values of an activation and per 128 x 128 block of a weight:
DeepSeek-V3's recipe (arXiv:2412.19437, section 3.3 and figure 7).

A scale for a whole row is set by the row's largest value. With one scale per 128 values, an
outlier costs precision only in its own block. All three matmuls follow one rule. The contracted
dim is split into blocks of 128, and within a block each row of the left operand has its own
scale. For the right operand there are two cases. A weight's columns share scales in groups of
128 (forward, and backward to the input). A gradient's columns each have their own scale
(backward to the weight).

The kernel is cuBLAS's. It is called through the operator below ``F.scaled_mm``: that function is
public, but torch 2.11 cannot trace its internals. Casts are plain arithmetic, which a compiler
fuses with the surrounding operations. (torchao has Triton kernels for the same casts, for
weights stored transposed.)"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dtron.fp8.recipe import BLOCK
from dtron.fp8.scaled_mm import scaled_by
from dtron.torch_compile import opaque


@opaque
class Blockwise(torch.autograd.Function):
    """Compute ``x [T, I] @ w [I, O]`` and both gradients. All sizes are multiples of 128. On a
    CPU the values are rounded to FP8 and multiplied in float32."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return _mm(x, w, weight=True)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        dx = _mm(g, w.t(), weight=True) if ctx.needs_input_grad[0] else None
        dw = _mm(x.t(), g, weight=False) if ctx.needs_input_grad[1] else None
        return dx, dw


def _mm(a: Tensor, b: Tensor, weight: bool) -> Tensor:
    """Compute ``a [M, K] @ b [K, N]``. ``weight``: whether columns of b share scales."""
    x, x_scale = _lines(a)  # [M, K], [M, K / 128]
    y, y_scale = _squares(b.t()) if weight else _lines(b.t())  # [N, K], [N (/ 128), K / 128]
    if a.device.type == "cpu":
        wide = lambda v, s: v.float() / s.repeat_interleave(BLOCK, 1)
        y_scale = y_scale.repeat_interleave(BLOCK, 0) if weight else y_scale
        found = wide(x, x_scale) @ wide(y, y_scale).t()
        return found.to(a.dtype)
    lines, squares = F.ScalingType.BlockWise1x128.value, F.ScalingType.BlockWise128x128.value
    # It needs rows of a and columns of b contiguous, and scales in the other memory order.
    y_scale = _padded(y_scale.reciprocal()).t() if weight else _columns(y_scale.reciprocal())
    return torch.ops.aten._scaled_mm_v2(
        x.contiguous(),
        y.contiguous().t(),
        [_columns(x_scale.reciprocal())],
        [lines],
        [],
        [y_scale],
        [squares if weight else lines],
        [],
        None,
        a.dtype,
    )


def _lines(x: Tensor) -> tuple[Tensor, Tensor]:
    values, scale = scaled_by(x.unflatten(1, (-1, BLOCK)), 2)
    return values.flatten(1), scale.squeeze(2)


def _squares(x: Tensor) -> tuple[Tensor, Tensor]:
    squares = x.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).transpose(1, 2)
    values, scale = scaled_by(squares.flatten(2), 2)
    return values.unflatten(2, (BLOCK, BLOCK)).transpose(1, 2).flatten(2).flatten(
        0, 1
    ), scale.squeeze(2)


def _columns(scale: Tensor) -> Tensor:
    return scale.t().contiguous().t()


def _padded(scale: Tensor) -> Tensor:
    """Pad scales to a multiple of 4 along the contracted dim, as cuBLAS reads them."""
    return F.pad(scale, (0, -scale.shape[1] % 4), value=1.0)
