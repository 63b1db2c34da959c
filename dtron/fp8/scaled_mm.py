"""One product in FP8 on the tensors of one device: torchao's recipes, scales, casts and kernels.

Each of the three products (forward; backward towards the input, and towards the weight) casts its
own two operands, because a scale must not vary along the dim that is summed over. What is saved for
backward is x and w as they came.

torchao has the whole of it too, ``matmul_with_hp_or_float8_args``, for weights that lie ``[out,
in]``. For ours, ``[in, out]``, it makes the weight's gradient transposed in memory, and the
optimizer would have to copy it. So the three products are written out here, from torchao's parts; a
test holds them against torchao's.

No name imported from torchao is public there: this file alone imports them, and is itself imported
only when FP8 is on (torchao takes some seconds).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from dtron.fp8.recipe import Scaling
from dtron.torch_compile import opaque


@contextmanager
def _quietly() -> Iterator[None]:
    """torchao's import warns about compiled parts that fit another torch. Nothing here needs them:
    they are skipped, and the warnings about it too."""
    name = "TORCHAO_FORCE_SKIP_LOADING_SO_FILES"
    before, loggers = (
        os.environ.get(name),
        [logging.getLogger(n) for n in ("torchao", "torch.utils._pytree")],
    )
    levels = [logger.level for logger in loggers]
    os.environ[name] = "1"
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


with _quietly():
    from torchao.float8.config import (
        CastConfig,
        Float8LinearConfig,
        ScalingGranularity,
        ScalingType,
    )
    from torchao.float8.float8_ops import addmm_float8_unwrapped
    from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated

# Made here, because torch.compile cannot trace how they are made. Scales are powers of two (those
# of torchao's own tensorwise recipe are not): multiplying by one moves no bit of a mantissa, so
# ranks that scale their shards differently still round like one device. Only values under FP8's
# normal range may differ.
_CONFIGS = {
    name: replace(Float8LinearConfig.from_recipe_name(name), round_scales_to_power_of_2=True)
    for name in get_args(Scaling)
    if name != "blockwise"  # torchao has it, but not among these
}


def product(x: Tensor, w: Tensor, scaling: Scaling) -> Tensor:
    """``x [T, I] @ w [I, O]`` in FP8, and both gradients; blockwise scales are in blockwise.py. On
    a CPU the values are rounded to FP8 and multiplied in float32."""
    return _Product.apply(x, w, scaling)


@opaque
class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, scaling: Scaling) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.scaling = scaling
        c = _CONFIGS[scaling]
        return _mm(x, c.cast_config_input, w, c.cast_config_weight, x.dtype)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w = ctx.saved_tensors
        c = _CONFIGS[ctx.scaling]
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _mm(
                g, c.cast_config_grad_output, w.t(), c.cast_config_weight_for_grad_input, x.dtype
            )
        if ctx.needs_input_grad[1]:
            x_cast, g_cast = (
                c.cast_config_input_for_grad_weight,
                c.cast_config_grad_output_for_grad_weight,
            )
            dw = _mm(x.t(), x_cast, g, g_cast, w.dtype)
        return dx, dw, None


class _Scaled(NamedTuple):
    values: Tensor  # float8
    scale: Tensor  # what they were multiplied by: a scalar, or one for each row or column


def _mm(a: Tensor, a_cast: CastConfig, b: Tensor, b_cast: CastConfig, dtype: torch.dtype) -> Tensor:
    """``a [M, K] @ b [K, N]``, both cast as said."""
    if a_cast.scaling_type is ScalingType.DISABLED:
        return a @ b
    (a, a_scale), (b, b_scale) = _scaled(a, a_cast, 1), _scaled(b, b_cast, 0)
    if a.device.type == "cpu":
        y = (a.float() / a_scale) @ (b.float() / b_scale)
        return y.to(dtype)
    if a_scale.ndim > b_scale.ndim:  # the kernels take scales of one kind
        b_scale = b_scale.expand(1, b.shape[1]).contiguous()
    # They want rows of a and columns of b contiguous. In forward that is a copy of the float8
    # weight and none of x; compiled, it is part of the cast. Fast accumulation adds up in less than
    # float32, as is usual in forward; in backward too it is worth another 3 to 7 %
    # (docs/performance.md).
    return addmm_float8_unwrapped(
        a.contiguous(), a_scale, b.t().contiguous().t(), b_scale, dtype, use_fast_accum=True
    )


def _scaled(x: Tensor, cast: CastConfig, summed: int) -> _Scaled:
    """``x`` in float8, filling its range. Rowwise, everything along the summed dim shares a
    scale."""
    by_row = cast.scaling_granularity is ScalingGranularity.AXISWISE
    return scaled_by(x, summed if by_row else None, cast.target_dtype)


def scaled_by(x: Tensor, summed: int | None, dtype: torch.dtype = torch.float8_e4m3fn) -> _Scaled:
    """The same, with a scale for everything along the summed dim (None: one for all)."""
    by = ScalingGranularity.TENSORWISE if summed is None else ScalingGranularity.AXISWISE
    scale = tensor_to_scale(
        x, dtype, scaling_granularity=by, axiswise_dim=summed, round_scales_to_power_of_2=True
    )
    # Saturated, because a cast of torch 2.11 makes NaN of what is out of range.
    return _Scaled(to_fp8_saturated(x.float() * scale, dtype), scale)
