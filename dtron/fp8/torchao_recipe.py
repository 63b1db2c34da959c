"""The recipes that torchao names: ``tensorwise``, ``rowwise`` and ``rowwise_with_gw_hp``.

This file does not import torchao, which takes some seconds. Its methods do, through scaled_mm.py,
and only when FP8 is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dtron.errors import UserError
from dtron.fp8.recipe import Recipe, Role


@dataclass(frozen=True)
class TorchaoRecipe(Recipe):
    """torchao's scales, casts and kernels, under torchao's name for the recipe. Scales are powers
    of two."""

    fp8_gather = True

    def load(self) -> None:
        try:
            import dtron.fp8.scaled_mm  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"--fp8 {self.name}: needs torchao 0.18 ({error}); pip install 'dtron[fp8]'"
            ) from error

    def cast(self, x: Tensor, dim: int, role: Role) -> Any:
        from dtron.fp8.scaled_mm import cast

        return cast(x, dim, role, self.name)

    def mm(self, a: Any, b: Any, dtype: torch.dtype) -> Tensor:
        from dtron.fp8.scaled_mm import mm

        return mm(a, b, dtype)

    def grouped_mm(self, x: Tensor, w: Tensor, ends_E: Tensor) -> Tensor:
        from dtron.fp8.scaled_grouped_mm import scaled_grouped_mm

        return scaled_grouped_mm(x, w, ends_E)
