"""Matmuls whose weight may have several named axes: ``w_q`` is ``[embed, heads, head_dim]``.

The sharding rules use the axis names. So a weight keeps the shape with all named axes, and is
flattened only for the matmul. Flattening is free if the sharded dim is the first of the flattened
dims. It is the first in all weights of dtron.
"""

from __future__ import annotations

from torch import Tensor

from dtron.fp8.matmul import matmul
from dtron.fp8.recipe import Recipe
from dtron.layers.dora import ScaledWeight
from dtron.layers.lora import LoRA
from dtron.layers.quantized_weight import dense
from dtron.tree import Adapted


def linear(
    x: Tensor,
    w: Tensor | Adapted,
    b: Tensor | None = None,
    recipe: Recipe | None = None,
) -> Tensor:
    """Return ``x [..., I] @ w [I, *O] (+ b [*O])``, ``[..., *O]``. If I is sharded, the sum over I
    stays pending. A bias must not be added before this sum: pass no bias here, and add the bias
    after the constrain.

    ``w``: a weight, or an ``Adapted`` weight: ``LoRA``, ``ScaledWeight``, ``QuantizedWeight``.
    ``recipe``: the recipe for an FP8 matmul, or None."""
    w = dense(w)
    if isinstance(w, ScaledWeight):
        y = w.scaled(linear(x, w.base, recipe=recipe))
    elif isinstance(w, LoRA):
        y = linear(x, w.base, recipe=recipe) + w.update(x).unflatten(-1, w.shape[1:])
    elif w.ndim > 2:
        y = matmul(x, w.flatten(1), recipe).unflatten(-1, w.shape[1:])
    else:
        y = matmul(x, w, recipe)
    return y if b is None else y + b


def linear_in(x: Tensor, w: Tensor | Adapted, recipe: Recipe | None = None) -> Tensor:
    """Return ``x [T, *I] @ w [*I, O]``, ``[T, O]``: contract all of w's leading axes."""
    w = dense(w)
    if isinstance(w, ScaledWeight):
        return w.scaled(linear_in(x, w.base, recipe))
    if isinstance(w, LoRA):
        return linear_in(x, w.base, recipe) + w.update(x.flatten(1))
    return matmul(x.flatten(1), w.flatten(0, -2), recipe)
