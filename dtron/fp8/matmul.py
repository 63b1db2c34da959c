"""Matmuls in FP8: 8-bit floating point, with twice the arithmetic rate of bfloat16 on GPUs that
support FP8 (Micikevicius et al. 2022, arXiv:2209.05433).

Of its 8 bits, e4m3 uses 4 for the exponent and 3 for the mantissa (largest value 448); e5m2 uses
5 and 2 (57344). This range is too narrow for unscaled activations and gradients. So each operand
is multiplied by a scale that fills the range and is then rounded. The result is divided by the
scales again. The scales are computed from the tensors that are being cast (dynamic scaling). A
``Recipe`` defines how many scales a tensor has. Weights, activations and everything between
matmuls stay in high precision. See docs/fp8.md."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import local_map

from dtron.distributed.redistribute import part_of
from dtron.errors import PlacementError
from dtron.fp8.autograd import fp8_grouped_mm, fp8_mm
from dtron.fp8.recipe import Recipe

# Placements of one matmul and its gradients, over one mesh axis:
#    x             w             y             gradient of x, of w
_PLACEMENTS = (
    (Shard(0), Replicate(), Shard(0), Shard(0), Partial()),  # rows: tokens
    (Replicate(), Shard(1), Shard(1), Partial(), Shard(1)),  # columns of the weight
    (Shard(1), Shard(0), Partial(), Shard(1), Shard(0)),  # the contracted dim
    (Replicate(), Replicate(), Replicate(), Replicate(), Replicate()),  # every rank does the same
)


def matmul(x: Tensor, w: Tensor, recipe: Recipe | None = None) -> Tensor:
    """Compute ``x [T, I] @ w [I, O]``. With a recipe, use FP8 if the matmul is large enough on
    one rank (see ``Recipe.converts``).

    DTensors enter a local region, whose placements follow from the operands' placements. Nothing
    is communicated, not even a largest value (amax): each rank scales its own shards. Scales are
    powers of two, so a value rounds the same under any of them. The result differs from one
    device's only by the order of sums and by values near zero. Raises PlacementError if a matmul
    cannot be local."""
    if recipe is None or not recipe.converts(*_sizes(x, w)):
        return x @ w
    recipe.load()
    product = partial(fp8_mm, name=recipe.name)
    if not isinstance(x, DTensor):
        return product(x, w)
    assert isinstance(w, DTensor)  # on a mesh every tensor is
    y_placements, dx_placements, dw_placements = _placements(x, w)
    region = local_map(
        product,
        out_placements=y_placements,
        in_placements=(x.placements, w.placements),
        in_grad_placements=(dx_placements, dw_placements),
        device_mesh=x.device_mesh,
    )
    return region(x, w)


def grouped_matmul(
    x: Tensor, w: Tensor, ends_E: Tensor | None, recipe: Recipe | None
) -> Tensor | None:
    """Compute the experts' matmuls in FP8 on the tensors of one rank; see ``fp8_grouped_mm``.
    Returns None if the recipe does not convert them.

    ``x``: ``[R, I]`` with ``ends_E``, the row where each expert ends; or ``[E, C, I]`` with
        None.
    ``w``: ``[E, I, O]``."""
    inner, outer = w.shape[1:]
    # Rows are not contracted here, so any number of rows is allowed except 0.
    if recipe is None or not x.numel() or not recipe.converts(recipe.multiple, inner, outer):
        return None
    recipe.load()
    product = partial(fp8_grouped_mm, name=recipe.name)
    if ends_E is not None:
        return product(x, w, ends_E)
    ends_E = torch.arange(1, x.shape[0] + 1, device=x.device) * x.shape[1]
    return product(x.flatten(0, 1), w, ends_E).unflatten(0, x.shape[:2])


def compile_options(recipe: Recipe | None) -> dict[str, Any]:
    """Return the options for ``torch.compile(..., options=)`` with the inductor backend that the
    recipe needs."""
    return {} if recipe is None else dict(recipe.compile_options)


def _sizes(x: Tensor, w: Tensor) -> tuple[float, float, float]:
    """Return ``(T, I, O)`` on one rank."""
    (tokens, inner), (_, outer) = _own_shape(x), _own_shape(w)
    return tokens, inner, outer


def _own_shape(x: Tensor) -> Sequence[float]:
    """Return the shape of a rank's shard, with fractions where the mesh does not divide a dim."""
    return part_of(x.shape, x.device_mesh, x.placements) if isinstance(x, DTensor) else x.shape


def _placements(x: DTensor, w: DTensor) -> tuple[list, list, list]:
    """Return the placements of ``x @ w`` and of the gradients of x and w."""
    rows = []
    for axis, (x_axis, w_axis) in enumerate(zip(x.placements, w.placements, strict=True)):
        row = [results for a, b, *results in _PLACEMENTS if a == x_axis and b == w_axis]
        if not row:
            raise PlacementError(
                f"an FP8 matmul is local, but over mesh axis {axis} x has the placement {x_axis} "
                f"and w {w_axis}: constrain them first, to the same sharding of the contracted "
                "dim, or shard one of the other dims"
            )
        rows += row
    y, dx, dw = map(list, zip(*rows, strict=True))
    return y, dx, dw
