"""Matmuls whose weight may have several named axes: ``w_q`` is ``[embed, heads, head_dim]``.

The sharding rules use the axis names. So a weight keeps the shape with all named axes, and is
flattened only for the matmul. Flattening is free if the sharded dim is the first of the flattened
dims. This holds for all weights in dtron.
"""

from __future__ import annotations

from torch import Tensor

from dtron.fp8.matmul import matmul
from dtron.fp8.recipe import Recipe


def linear(x: Tensor, w: Tensor, b: Tensor | None = None, recipe: Recipe | None = None) -> Tensor:
    """Return ``x [..., I] @ w [I, *O] (+ b [*O])``, ``[..., *O]``. If I is sharded, the sum over I
    stays pending. Then a bias must not be added yet: pass none here, and add it after the
    constrain. ``recipe``: the recipe for an FP8 matmul."""
    y = (
        matmul(x, w.flatten(1), recipe).unflatten(-1, w.shape[1:])
        if w.ndim > 2
        else matmul(x, w, recipe)
    )
    return y if b is None else y + b


def linear_in(x: Tensor, w: Tensor, recipe: Recipe | None = None) -> Tensor:
    """Return ``x [T, *I] @ w [*I, O]``, ``[T, O]``: contract all of w's leading axes."""
    return matmul(x.flatten(1), w.flatten(0, -2), recipe)
