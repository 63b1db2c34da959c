"""FP8 matmuls under autograd, on the tensors of one rank, for every recipe.

There are three matmuls: forward, backward to the input and backward to the weight. Each casts its
own two operands, because a scale must not vary along the contracted dim. x and w are saved for
backward uncast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dtron.fp8.grouped_mm import weight_gradient
from dtron.fp8.recipes import RECIPES


def fp8_mm(x: Tensor, w: Tensor, name: str) -> Tensor:
    """Compute ``x [T, I] @ w [I, O]`` in FP8, and both gradients. On a CPU the values are rounded
    to FP8 and multiplied in float32."""
    return Fp8Matmul.apply(x, w, name)


def fp8_grouped_mm(x: Tensor, w: Tensor, ends_E: Tensor, name: str) -> Tensor:
    """Compute each expert's rows of x times its matrix, ``[R, O]``, in FP8, and both gradients. On
    a CPU the values are rounded to FP8 and multiplied in float32.

    The gradient of the matrices stays in high precision. Its contracted dim is the rows, and FP8
    kernels need a multiple of 16 rows for every expert; routing does not guarantee this.

    ``x``: ``[R, I]``, sorted by expert. R is not 0.
    ``w``: ``[E, I, O]``. I and O are multiples of the recipe's ``multiple``.
    ``ends_E``: the rows of expert e end before ``ends_E[e]``. Output rows after the last end are
        undefined."""
    return Fp8GroupedMatmul.apply(x, w, ends_E.to(torch.int32), name)


class Fp8Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.name, recipe = name, RECIPES[name]
        return recipe.mm(recipe.cast(x, 1, "input"), recipe.cast(w, 0, "weight"), x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w = ctx.saved_tensors
        recipe, dx, dw = RECIPES[ctx.name], None, None
        if ctx.needs_input_grad[0]:
            a, b = recipe.cast(g, 1, "grad_output"), recipe.cast(w.t(), 0, "weight_for_grad_input")
            dx = recipe.mm(a, b, x.dtype)
        if ctx.needs_input_grad[1]:
            a = recipe.cast(x.t(), 1, "input_for_grad_weight")
            b = recipe.cast(g, 0, "grad_output_for_grad_weight")
            dw = recipe.mm(a, b, w.dtype)
        return dx, dw, None


class Fp8GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, ends_E: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(x, w, ends_E)
        ctx.name = name
        return RECIPES[name].grouped_mm(x, w, ends_E)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, w, ends_E = ctx.saved_tensors
        recipe = RECIPES[ctx.name]
        dx = recipe.grouped_mm(g, w.mT, ends_E) if ctx.needs_input_grad[0] else None
        dw = weight_gradient(x, g, ends_E) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None
