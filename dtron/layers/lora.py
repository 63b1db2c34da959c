"""LoRA: a frozen weight with a trained low-rank update (Hu et al. 2021, arXiv:2106.09685, equation
3).

    y = x W + (alpha / rank) (x A) B

``A [I, rank]`` and ``B [rank, O]`` are two more weights, declared on the axes of W and on the axis
``rank``. So the rules of W shard them, too: A like the rows of W, B like its columns. B begins as
zeros, so training begins at the frozen model.

``LoRA`` is a node of the tree of params in the place of W. The layers do not know of it: ``linear``
and the experts' ``product`` take a weight or such a node. On a mesh the update is one local region.
Nothing is communicated for it: a sum that is pending for ``x W`` is pending for ``x A B``, and the
gradients of A and B are summed over the ranks once a step, like those of a norm.

Left out: dropout on x, as everywhere in dtron.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import local_map

from dtron.errors import PlacementError
from dtron.layers.quantized_weight import dense
from dtron.params import value
from dtron.tree import Adapted

# Placements of an update and its gradients, over one mesh axis:
#    x             A             B             y             gradient of x, of A, of B
_PLACEMENTS = (
    (Shard(0), Replicate(), Replicate(), Shard(0), Shard(0), Partial(), Partial()),  # tokens
    (Replicate(), Replicate(), Shard(1), Shard(1), Partial(), Partial(), Shard(1)),  # columns of W
    (Shard(1), Shard(0), Replicate(), Partial(), Shard(1), Shard(0), Partial()),  # rows of W
    (*[Replicate()] * 3, *[Replicate()] * 4),  # every rank does the same
)


@dataclass(frozen=True)
class LoRA(Adapted):
    """A frozen weight and its update.

    ``base``: the weight, which may be a ``QuantizedWeight``: ``[*E, *I, *O]``. E is the axis of
        experts, or no axis; I are the axes over which a matmul sums.
    ``lora_a``, ``lora_b``: ``[*E, *I, rank]`` and ``[*E, rank, *O]``.
    ``scale``: alpha / rank.
    ``first``: the number of axes E and I together.
    ``experts``: whether there is an axis E."""

    base: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scale: float = value("scale")
    first: int = value("first")
    experts: bool = value("experts")

    def split_axes(self, axes: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        ahead = axes[: int(self.experts)]
        return [axes, (*axes[: self.first], "rank"), (*ahead, "rank", *axes[self.first :])]

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight."""
        return self.base.shape

    def merged(self) -> Tensor:
        """Return the weight with its update, of tensors that are whole."""
        ahead = int(self.experts)
        inputs = self.lora_a.flatten(ahead, self.first - 1)
        update = inputs @ self.lora_b.flatten(ahead + 1)
        return dense(self.base) + self.scale * update.view(self.shape)

    def update(self, x: Tensor) -> Tensor:
        """Return the update's part of ``linear`` for ``x [T, I]``: ``[T, O]``, both flattened."""
        return low_rank(x, self.lora_a.flatten(0, -2), self.lora_b.flatten(1), self.scale)


def low_rank(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Compute ``scale * x [T, I] @ a [I, rank] @ b [rank, O]``. On a mesh, each rank computes its
    own part. Raises PlacementError if the products cannot be local."""
    product = partial(_product, scale=scale)
    if not isinstance(x, DTensor):
        return product(x, a, b)
    assert isinstance(a, DTensor) and isinstance(b, DTensor)  # on a mesh every tensor is
    y, *gradients = _placements(x, a, b)
    return local_map(
        product,
        out_placements=y,
        in_placements=(x.placements, a.placements, b.placements),
        in_grad_placements=tuple(gradients),
        device_mesh=x.device_mesh,
    )(x, a, b)


def _product(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return (x @ a * scale) @ b


def _placements(x: DTensor, a: DTensor, b: DTensor) -> list[list[Any]]:
    """Return the placements of the update, and of the gradients of x, a and b."""
    rows = []
    for axis, given in enumerate(zip(x.placements, a.placements, b.placements, strict=True)):
        row = next((row[3:] for row in _PLACEMENTS if row[:3] == given), None)
        if row is None:
            raise PlacementError(
                f"a low-rank update is local, but over mesh axis {axis} x, A and B have the "
                f"placements {given}: constrain x first, or declare A and B on the axes of the "
                "weight"
            )
        rows.append(row)
    return [list(column) for column in zip(*rows, strict=True)]
