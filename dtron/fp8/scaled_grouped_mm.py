"""The kernel for experts' matmuls in FP8: the rows of each expert times the expert's matrix, all in
one kernel.

Scales are per row of the left operand and per column of each expert's matrix. torch's kernel
supports no others, so every recipe of torchao shares this kernel. A row's scale does not depend on
the other rows of the buffer, and a row rounds the same on any rank.

Only the casts are torchao's (see scaled_mm.py). The kernel is torch's, and private there."""

from __future__ import annotations

import torch
from torch import Tensor

from dtron.fp8.grouped_mm import masked
from dtron.fp8.scaled_mm import scaled_by
from dtron.torch_compile import kernel_device


def scaled_grouped_mm(a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply ``a [R, K]`` by ``b [E, K, N]`` -> ``[R, N]``; see ``Recipe.grouped_mm``."""
    (x, x_scale), (y, y_scale) = scaled_by(a, 1), scaled_by(b, 1)
    if kernel_device(a.device) == "cpu":
        product = masked(x.float() / x_scale, y.float() / y_scale, ends_E)
        return product.to(a.dtype)
    return torch._scaled_grouped_mm(  # needs rows of a and columns of b contiguous
        x.contiguous(),
        y.mT.contiguous().mT,
        x_scale.reciprocal().squeeze(1),
        y_scale.reciprocal().squeeze(1),
        ends_E,
        out_dtype=a.dtype,
        use_fast_accum=True,
    )
