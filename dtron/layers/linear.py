"""A matrix product whose weight may keep several named axes: ``w_q`` is ``[embed, heads,
head_dim]``.

The names are what the rules shard by, so a weight stays in the shape that has them and is flattened
only for the product. Flattening is free where the sharded dim is the leading one of those
flattened, as it is in all of ours.
"""

from __future__ import annotations

from torch import Tensor

from dtron.fp8.matmul import matmul
from dtron.fp8.recipe import Recipe


def linear(x: Tensor, w: Tensor, b: Tensor | None = None, recipe: Recipe | None = None) -> Tensor:
    """``x [..., I] @ w [I, *O] (+ b [*O])`` -> ``[..., *O]``. A sum over a sharded I is left
    pending; then a bias must wait for it, so pass none and add it after the constrain. ``recipe``:
    the product in FP8."""
    y = (
        matmul(x, w.flatten(1), recipe).unflatten(-1, w.shape[1:])
        if w.ndim > 2
        else matmul(x, w, recipe)
    )
    return y if b is None else y + b


def linear_in(x: Tensor, w: Tensor, recipe: Recipe | None = None) -> Tensor:
    """``x [T, *I] @ w [*I, O]`` -> ``[T, O]``: contract all of w's leading axes."""
    return matmul(x.flatten(1), w.flatten(0, -2), recipe)
