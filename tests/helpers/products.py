"""Operands, errors and expected errors of FP8 matmuls."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dtron.fp8.matmul import matmul
from dtron.fp8.recipes import RECIPES

# Of y, and of the gradients of x and w. e4m3 keeps 3 bits: a rounded value is off by .027 (root
# mean square), a product of two by .038; e5m2 is twice as coarse. The last is bfloat16's own.
ERRORS = {
    "tensorwise": (0.038, 0.059, 0.059),
    "rowwise": (0.038, 0.038, 0.038),
    "rowwise_with_gw_hp": (0.038, 0.038, 0.0017),
    "blockwise": (0.038, 0.038, 0.038),
}
NAMES = list(ERRORS)
# Recipes whose scales bring any operand into the range of its format.
SCALED = ["tensorwise", "rowwise", "rowwise_with_gw_hp", "blockwise"]
SCALED_BY_ROW = [name for name in SCALED if name != "tensorwise"]  # or by smaller blocks
TORCHAO = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]  # torchao has the same recipe


def operands(
    t: int = 256, i: int = 384, o: int = 128, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """x, w and the gradient of their matmul."""
    shapes = enumerate([(t, i), (i, o), (t, o)])
    return [
        torch.randn(s, generator=torch.Generator().manual_seed(seed + n)).to(dtype)
        for n, s in shapes
    ]


def converted(name: str):
    """The matmul in FP8, for matrices of any size."""
    return partial(matmul, recipe=replace(RECIPES[name], min_weights=0))
