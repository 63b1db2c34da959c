"""Casts and kernel of one FP8 matmul on the tensors of one device, from torchao's functions.

torchao also has the whole function under autograd, ``matmul_with_hp_or_float8_args``, for weights
stored ``[out, in]``. For dtron's weights, ``[in, out]``, torchao's function returns the weight's
gradient transposed in memory, and the optimizer would have to copy it. So the three matmuls are
written out in autograd.py. A test compares them with torchao's own.

No name imported from torchao here is public. Only this file imports them, and it is imported
only when FP8 is on (importing torchao takes some seconds)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dtron.fp8.recipe import Role
from dtron.torch_compile import kernel_device


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence warnings of torchao's import about compiled extensions built for another torch. dtron
    does not need these extensions, so their loading is skipped and its warnings are hidden."""
    name = "TORCHAO_FORCE_SKIP_LOADING_SO_FILES"
    before = os.environ.get(name)
    loggers = [logging.getLogger(n) for n in ("torchao", "torch.utils._pytree")]
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
        Float8LinearRecipeName,
        ScalingGranularity,
        ScalingType,
    )
    from torchao.float8.float8_ops import addmm_float8_unwrapped
    from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated

# The configs are built at import, because torch.compile cannot trace their construction. Scales
# are powers of two (not so in torchao's own tensorwise recipe). Multiplying by a power of two does
# not change the mantissa. So ranks that scale their shards differently still round like one device.
# Only values below FP8's normal range may differ.
_CONFIGS = {
    name: replace(Float8LinearConfig.from_recipe_name(name), round_scales_to_power_of_2=True)
    for name in (recipe.value for recipe in Float8LinearRecipeName)
}


class Scaled(NamedTuple):
    """A cast operand.

    ``values``: in float8, or uncast if ``scale`` is None.
    ``scale``: the factor of the values: a scalar, or one per row or column. None: the recipe leaves
        this matmul in high precision."""

    values: Tensor
    scale: Tensor | None


def cast(x: Tensor, dim: int, role: Role, name: str) -> Scaled:
    """Cast an operand by torchao's recipe of this name; see ``Recipe.cast``."""
    config: CastConfig = getattr(_CONFIGS[name], f"cast_config_{role}")
    if config.scaling_type is ScalingType.DISABLED:
        return Scaled(x, None)
    by_row = config.scaling_granularity is ScalingGranularity.AXISWISE
    return Scaled(*scaled_by(x, dim if by_row else None, config.target_dtype))


def mm(a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor:
    """Multiply ``a [M, K]`` by ``b [K, N]``; see ``Recipe.mm``."""
    (a, a_scale), (b, b_scale) = a, b
    if a_scale is None or b_scale is None:
        return a @ b
    if kernel_device(a.device) == "cpu":
        return ((a.float() / a_scale) @ (b.float() / b_scale)).to(dtype)
    if a_scale.ndim > b_scale.ndim:  # the kernels need both scales of one kind
        b_scale = b_scale.expand(1, b.shape[1]).contiguous()
    # The kernels need rows of a and columns of b contiguous. In forward the float8 weight is copied
    # for it, but not x; compiled, the copy is part of the cast. Fast accumulation sums in less than
    # float32. It is usual in forward; in backward it gains another 3 to 7 % (docs/performance.md).
    return addmm_float8_unwrapped(
        a.contiguous(), a_scale, b.t().contiguous().t(), b_scale, dtype, use_fast_accum=True
    )


def scaled_by(
    x: Tensor, summed: int | None, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Tensor, Tensor]:
    """Cast ``x`` to float8, and return the values and their scale.

    ``summed``: the contracted dim, along which all values have one scale (None: the tensor has one
        scale)."""
    by = ScalingGranularity.TENSORWISE if summed is None else ScalingGranularity.AXISWISE
    scale = tensor_to_scale(
        x, dtype, scaling_granularity=by, axiswise_dim=summed, round_scales_to_power_of_2=True
    )
    # Saturate: in torch 2.11 a cast turns out-of-range values into NaN.
    return to_fp8_saturated(x.float() * scale, dtype), scale
