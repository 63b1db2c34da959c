"""DoRA: a low-rank update of a weight's direction, and a trained magnitude of each output (Liu et
al. 2024, arXiv:2402.09353, equation 5).

    V = W + (alpha / rank) A B
    y = (m / |V|) * (x V)

|V| has the norm of each output's weights. The magnitude m begins as |W|, so training begins at the
frozen model. As in the paper (section 4.3) no gradient flows through |V|.

A block turns m into the factor m / |V| once, before its layers run (``with_factors``). |V| is a sum
over the inputs of W. Where they are sharded over tp, one all-reduce of a number for each output
completes it. The layers then multiply by the factor, which is local.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import local_map

from dtron.layers.lora import LoRA
from dtron.layers.quantized_weight import dense
from dtron.tree import Adapted, fill, map_units

# Placements of outputs [T, O] and factors [O], and of their gradients, over one mesh axis.
_PLACEMENTS = (
    (Shard(0), Replicate(), Shard(0), Partial()),  # tokens
    (Shard(1), Shard(0), Shard(1), Shard(0)),  # outputs
    (Partial(), Replicate(), Replicate(), Partial()),  # a sum over inputs is pending
    (Replicate(), Replicate(), Replicate(), Replicate()),
)


@dataclass(frozen=True)
class DoRA(Adapted):
    """A weight with a trained direction and magnitude.

    ``base``: the weight with its low-rank update.
    ``magnitude``: ``[*E, *O]``."""

    base: LoRA
    magnitude: Tensor

    def split_axes(self, axes: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        return [axes, (*axes[: int(self.base.experts)], *axes[self.base.first :])]

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight."""
        return self.base.shape

    def filled(self, load: Callable[[Any], Any]) -> DoRA:
        """Load the weights. Where ``load`` has no magnitude (None), it is the norm of the weight
        with its update."""
        base, magnitude = fill(self.base, load), load(self.magnitude)
        return DoRA(base, norms(base) if magnitude is None else magnitude)

    def with_factor(self) -> ScaledWeight:
        """Return the weight with the factor of each output in the place of its magnitude."""
        return ScaledWeight(self.base, self.magnitude / norms(self.base).to(self.magnitude.dtype))

    def merged(self) -> Tensor:
        """Return the weight with direction and magnitude, of tensors that are whole."""
        direction, ahead = self.base.merged(), int(self.base.experts)
        inputs = self.base.first - ahead
        factor = self.magnitude / norms(self.base)
        return direction * factor[(slice(None),) * ahead + (None,) * inputs]


@dataclass(frozen=True)
class ScaledWeight(Adapted):
    """A weight whose outputs are multiplied by a factor each.

    ``factor``: ``[*E, *O]``."""

    base: LoRA
    factor: Tensor

    split_axes = DoRA.split_axes
    shape = DoRA.shape

    def scaled(self, y: Tensor) -> Tensor:
        """Multiply the outputs ``y [T, *O]`` of a matmul by their factors. Rank-local."""
        factor = self.factor.flatten()
        flat = y.flatten(1)
        if isinstance(flat, DTensor) and isinstance(factor, DTensor):
            rows = [
                next(row for row in _PLACEMENTS if row[:2] == given)
                for given in zip(flat.placements, factor.placements, strict=True)
            ]
            _, _, *gradients = ([row[i] for row in rows] for i in range(4))
            product = local_map(
                torch.mul,
                out_placements=list(flat.placements),
                in_placements=(flat.placements, factor.placements),
                in_grad_placements=tuple(gradients),
                device_mesh=flat.device_mesh,
            )
            return product(flat, factor).view(y.shape)
        return (flat * factor).view(y.shape)


def with_factors(p: Any) -> Any:
    """Return a block's weights with factors in the place of magnitudes."""
    return map_units(lambda w: w.with_factor() if isinstance(w, DoRA) else w, p)


@torch.no_grad()
def norms(w: LoRA) -> Tensor:
    """Return the norm of the weights of each output, ``[*E, *O]``, with the update. Sums over
    sharded inputs are all-reduced."""
    base = dense(w.base)
    square = partial(_squares, w)
    if not isinstance(base, DTensor):
        return square(base, w.lora_a, w.lora_b).sqrt()
    tensors: Any = (base, w.lora_a, w.lora_b)
    before = [_of_squares(p, w.first, w.experts) for p in base.placements]
    region = local_map(
        square,
        out_placements=before,
        in_placements=tuple(x.placements for x in tensors),
        device_mesh=base.device_mesh,
    )
    after = [Replicate() if p.is_partial() else p for p in before]
    return region(*tensors).redistribute(base.device_mesh, after).sqrt()


def _squares(w: LoRA, base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the squared norms of a rank's shard, given its tensors."""
    whole = replace(w, base=base, lora_a=a, lora_b=b).merged()
    wide = torch.promote_types(whole.dtype, torch.float32)
    return whole.to(wide).square().sum(tuple(range(int(w.experts), w.first)))


def _of_squares(p: Placement, first: int, experts: bool) -> Placement:
    """Return the placement of the squares' sum over inputs, given a placement of the weight."""
    if not isinstance(p, Shard) or p.dim < int(experts):
        return p
    return Partial() if p.dim < first else Shard(p.dim - first + int(experts))
