"""Matmuls of experts in FP8: the rows of each expert times the expert's matrix, all in one
kernel.

Scales are per row of the left operand and per column of each expert's matrix, for every recipe:
the kernel supports no others. So a row's scale does not depend on the other rows of the buffer,
and a row rounds the same on any rank. The gradient of the matrices stays in high precision. Its
contracted dim is the rows, and the kernel needs a multiple of 16 rows for every expert; routing
does not guarantee this.

Only the casts are torchao's (see scaled_mm.py). The kernel is torch's, and private there."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dtron.fp8.grouped_mm import masked, runs
from dtron.fp8.scaled_mm import scaled_by
from dtron.torch_compile import opaque


def grouped_product(x: Tensor, w: Tensor, ends_E: Tensor) -> Tensor:
    """Compute each expert's rows of x times its matrix, ``[R, O]``, and both gradients. On a CPU
    the values are rounded to FP8 and multiplied in float32.

    ``x``: ``[R, I]``, sorted by expert. R is not 0.
    ``w``: ``[E, I, O]``. I and O are multiples of 16.
    ``ends_E``: the rows of expert e end before ``ends_E[e]``. Output rows after the last end are
        undefined."""
    return _Grouped.apply(x, w, ends_E.to(torch.int32))


@opaque
class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, ends_E)
        return _mm(x, w, ends_E)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w, ends_E = ctx.saved_tensors
        dx = _mm(g, w.mT, ends_E) if ctx.needs_input_grad[0] else None
        dw = _outer(x, g, ends_E) if ctx.needs_input_grad[1] else None
        return dx, dw, None


def _mm(a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply ``a [R, K]`` by ``b [E, K, N]`` -> ``[R, N]``."""
    (x, x_scale), (y, y_scale) = scaled_by(a, 1), scaled_by(b, 1)
    if a.device.type == "cpu":
        found = masked(x.float() / x_scale, y.float() / y_scale, ends_E)
        return found.to(a.dtype)
    return torch._scaled_grouped_mm(  # needs rows of a and columns of b contiguous
        x.contiguous(),
        y.mT.contiguous().mT,
        x_scale.reciprocal().squeeze(1),
        y_scale.reciprocal().squeeze(1),
        ends_E,
        out_dtype=a.dtype,
        use_fast_accum=True,
    )


def _outer(x: Tensor, g: Tensor, ends_E: Tensor) -> Tensor:
    """Compute ``x[e].T @ g[e]`` for the rows of each expert, in high precision: ``[E, I, O]``."""
    if x.device.type == "cpu":
        return torch.stack([torch.where(rows_R, x, 0).mT @ g for rows_R in runs(x, ends_E)])
    return F.grouped_mm(x.mT, g, offs=ends_E)
