"""Matrix products in FP8: 8-bit floating point, for twice the arithmetic rate of bfloat16 on GPUs
that have it (Micikevicius et al. 2022, arXiv:2209.05433).

Of 8 bits, e4m3 spends 4 on the exponent and 3 on the mantissa (largest value 448), e5m2 5 and 2
(57344): too narrow a range for activations and gradients as they are. So each operand is multiplied
by a scale that fills the range, rounded, and the product divided by the scales again. The scales
are computed from the very tensors that are cast (dynamic scaling); a ``Recipe`` says how many there
are. Weights, activations and everything between products stay in high precision. See docs/fp8.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import local_map

from dtron.distributed.redistribute import part_of
from dtron.errors import PlacementError
from dtron.fp8.recipe import Recipe, Scaling

# Tensor parallelism of one product, over one mesh axis:
#    x             w             y             gradient of x, of w
_PLACEMENTS = (
    (Shard(0), Replicate(), Shard(0), Shard(0), Partial()),  # rows: tokens
    (Replicate(), Shard(1), Shard(1), Partial(), Shard(1)),  # columns of the weight
    (Shard(1), Shard(0), Partial(), Shard(1), Shard(0)),  # the summed dim
    (Replicate(), Replicate(), Replicate(), Replicate(), Replicate()),  # every rank does the same
)


def matmul(x: Tensor, w: Tensor, recipe: Recipe | None = None) -> Tensor:
    """``x [T, I] @ w [I, O]``; with a recipe, in FP8 where the product is large enough on one rank
    (see ``Recipe.converts``).

    DTensors enter a local region, whose placements follow from theirs. Nothing is communicated, not
    even a largest value: each rank has scales of its own shards. These are powers of two, under
    which a value rounds as it does under any other; so the result differs from one device's by the
    order of sums and by values near zero. Raises PlacementError where a product cannot be local."""
    if recipe is None or not recipe.converts(*_sizes(x, w)):
        return x @ w
    product = scaled_product(recipe.name)
    if not isinstance(x, DTensor):
        return product(x, w)
    mesh, (y_lies, dx_lies, dw_lies) = x.device_mesh, _placements(x, w)
    region = local_map(
        product,
        out_placements=y_lies,
        in_placements=(x.placements, w.placements),
        in_grad_placements=(dx_lies, dw_lies),
        device_mesh=mesh,
    )
    return region(x, w)


def scaled_product(scaling: Scaling) -> Callable[[Tensor, Tensor], Tensor]:
    """The product in FP8 on the tensors of one rank. Imports torchao."""
    if scaling == "blockwise":
        from dtron.fp8.blockwise import Blockwise

        return Blockwise.apply
    from dtron.fp8.scaled_mm import product

    return partial(product, scaling=scaling)


def grouped_matmul(
    x: Tensor, w: Tensor, ends_E: Tensor | None, recipe: Recipe | None
) -> Tensor | None:
    """Products of experts in FP8 on the tensors of one rank, see grouped.py: ``x [R, I]`` and where
    each expert's rows end, or ``x [E, C, I]`` and None, by ``w [E, I, O]``. None where the recipe
    does not convert them."""
    inner, outer = w.shape[1:]
    # Rows are no summed dim here, so that any number of them will do, but for none.
    if recipe is None or not x.numel() or not recipe.converts(recipe.multiple, inner, outer):
        return None
    from dtron.fp8.scaled_grouped_mm import grouped_product  # imports torchao

    if ends_E is not None:
        return grouped_product(x, w, ends_E)
    ends_E = torch.arange(1, x.shape[0] + 1, device=x.device) * x.shape[1]
    return grouped_product(x.flatten(0, 1), w, ends_E).unflatten(0, x.shape[:2])


def compile_options(recipe: Recipe | None) -> dict[str, Any]:
    """For ``torch.compile(..., options=)`` with the inductor backend. It must round to bfloat16
    where eager does: the scale is of the rounded values, and larger ones would leave the range of
    FP8."""
    return {} if recipe is None else {"emulate_precision_casts": True}


def _sizes(x: Tensor, w: Tensor) -> tuple[float, float, float]:
    """``(T, I, O)`` on one rank."""
    here = lambda x: (
        part_of(x.shape, x.device_mesh, x.placements) if isinstance(x, DTensor) else x.shape
    )
    (tokens, inner), (_, outer) = here(x), here(w)
    return tokens, inner, outer


def _placements(x: DTensor, w: DTensor) -> tuple[list, list, list]:
    """Of ``x @ w`` and of the gradients of x and w."""
    rows = []
    for axis, (x_lies, w_lies) in enumerate(zip(x.placements, w.placements, strict=True)):
        row = [rest for x_row, w_row, *rest in _PLACEMENTS if x_row == x_lies and w_row == w_lies]
        if not row:
            raise PlacementError(
                f"a product in FP8 is local, but over mesh axis {axis} x lies {x_lies} and w {w_lies}: "
                "constrain them first, to the same cut of the summed dim, or cut one of the others"
            )
        rows += row
    return tuple(map(list, zip(*rows, strict=True)))
