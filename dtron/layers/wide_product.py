"""Matmuls with factors in few bits and sums in float32.

The recurrent layers compute in float32: decays, and the states that pass through a whole sequence.
GPUs multiply float32 numbers at a twentieth of their rate for bfloat16. So the factors of a matmul
are rounded to the dtype of the activations, and its result stays in float32: no sum is rounded.
(The tensor cores add in float32 anyway. A matmul in bfloat16 rounds the result.) In float32 and
float64 nothing is rounded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dtron.torch_compile import kernel_device


def wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute ``a @ b`` in the dtype of a and b, ``[..., M, K] @ [..., K, N]``, with the same
    leading dims.

    ``dtype``: the dtype to which the factors are rounded, in backward too; one that is not narrower
        rounds nothing."""
    if dtype.itemsize >= a.dtype.itemsize:
        return a @ b
    return _WideProduct.apply(a, b, dtype)


class _WideProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        narrow = a.to(dtype), b.to(dtype)
        ctx.save_for_backward(*narrow)
        return _product(*narrow, a.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        narrow = g.to(a.dtype)
        return _product(narrow, b.mT, g.dtype), _product(a.mT, narrow, g.dtype), None


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    if kernel_device(a.device) != "cuda" or dtype != torch.float32:
        return a.to(dtype) @ b.to(dtype)
    flat = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=dtype)
    return flat.unflatten(0, a.shape[:-2])
