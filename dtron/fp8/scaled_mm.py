"""One FP8 matmul on the tensors of one device: torchao's recipes, scales, casts and kernels.

There are three matmuls: forward, backward to the input and backward to the weight. Each casts
its own two operands, because a scale must not vary along the contracted dim. x and w are saved
for backward uncast.

torchao also has the whole function, ``matmul_with_hp_or_float8_args``, for weights stored
``[out, in]``. For dtron's weights, ``[in, out]``, torchao's function returns the weight's
gradient transposed in memory, and the optimizer would have to copy it. So the three matmuls are
written out here from torchao's functions. A test compares them with torchao's own.

No name imported from torchao here is public. Only this file imports them, and it is imported
only when FP8 is on (importing torchao takes some seconds)."""

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
    """Silence warnings of torchao's import about compiled extensions built for another torch.
    Nothing here needs these extensions, so their loading is skipped and its warnings are
    hidden."""
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

# The configs are built at import, because torch.compile cannot trace their construction. Scales
# are powers of two (in torchao's own tensorwise recipe they are not). Multiplying by a power of two
# does not change the mantissa. So ranks that scale their shards differently still round like one
# device. Only values below FP8's normal range may differ.
_CONFIGS = {
    name: replace(Float8LinearConfig.from_recipe_name(name), round_scales_to_power_of_2=True)
    for name in get_args(Scaling)
    if name != "blockwise"  # torchao has blockwise too, but not as a named recipe
}


def product(x: Tensor, w: Tensor, scaling: Scaling) -> Tensor:
    """Compute ``x [T, I] @ w [I, O]`` in FP8, and both gradients. Blockwise scales are in
    blockwise.py. On a CPU the values are rounded to FP8 and multiplied in float32."""
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
    scale: Tensor  # the factor of the values: a scalar, or one per row or column


def _mm(a: Tensor, a_cast: CastConfig, b: Tensor, b_cast: CastConfig, dtype: torch.dtype) -> Tensor:
    """Compute ``a [M, K] @ b [K, N]``, with the operands cast by ``a_cast`` and ``b_cast``."""
    if a_cast.scaling_type is ScalingType.DISABLED:
        return a @ b
    (a, a_scale), (b, b_scale) = _scaled(a, a_cast, 1), _scaled(b, b_cast, 0)
    if a.device.type == "cpu":
        y = (a.float() / a_scale) @ (b.float() / b_scale)
        return y.to(dtype)
    if a_scale.ndim > b_scale.ndim:  # the kernels need both scales of one kind
        b_scale = b_scale.expand(1, b.shape[1]).contiguous()
    # The kernels need rows of a and columns of b contiguous. In forward this copies the float8
    # weight, but not x; compiled, the copy is part of the cast. Fast accumulation sums in less than
    # float32. This is usual in forward; using it in backward too gains another 3 to 7 %
    # (docs/performance.md).
    return addmm_float8_unwrapped(
        a.contiguous(), a_scale, b.t().contiguous().t(), b_scale, dtype, use_fast_accum=True
    )


def _scaled(x: Tensor, cast: CastConfig, summed: int) -> _Scaled:
    """Cast ``x`` to float8, scaled to fill its range. Rowwise, all values along the contracted
    dim (``summed``) share a scale."""
    by_row = cast.scaling_granularity is ScalingGranularity.AXISWISE
    return scaled_by(x, summed if by_row else None, cast.target_dtype)


def scaled_by(x: Tensor, summed: int | None, dtype: torch.dtype = torch.float8_e4m3fn) -> _Scaled:
    """Cast ``x`` to float8, with one scale for all values along the contracted dim ``summed``
    (None: one scale for the tensor)."""
    by = ScalingGranularity.TENSORWISE if summed is None else ScalingGranularity.AXISWISE
    scale = tensor_to_scale(
        x, dtype, scaling_granularity=by, axiswise_dim=summed, round_scales_to_power_of_2=True
    )
    # Saturate: in torch 2.11 a cast turns out-of-range values into NaN.
    return _Scaled(to_fp8_saturated(x.float() * scale, dtype), scale)
