"""The weights of linear layers, as matrices that an optimizer needs whole.

``is_matrix`` chooses the weights by their declaration. A ``LinearWeight`` says which matrices a
weight is: the dims over which a matmul sums are rows, the others are columns. ``dealt`` gives each
matrix an owner (matrix_exchange.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Shard

from dtron.distributed.redistribute import to_local
from dtron.mesh import Layout
from dtron.params import WeightSpec
from dtron.training.matrix_exchange import EXPERTS, Exchange, Job, Slots, deal
from dtron.training.newton_schulz import orthogonalized
from dtron.training.state_formats import Stored


def is_matrix(w: WeightSpec) -> bool:
    """Whether this is the weight of a linear layer."""
    return w.summed > 0 and not w.buffer


@dataclass(frozen=True)
class LinearWeight:
    """The weight of a linear layer, and what belongs to it. A weight of experts has a matrix for
    each expert.

    ``copy``: the weight in the compute dtype, or None.
    ``per_head``: whether each attention head is a matrix by itself."""

    spec: WeightSpec
    weight: Stored
    grad: Tensor
    momentum: Stored
    copy: Tensor | None
    per_head: bool

    @property
    def of_experts(self) -> bool:
        return self.spec.axes[0] == "experts"

    @property
    def count(self) -> int:
        """The number of matrices of which this rank has shards."""
        return len(to_local(self.weight.data)) if self.of_experts else 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one matrix, in the dims of the weight."""
        return self.spec.shape[int(self.of_experts) :]

    @property
    def _head(self) -> int | None:
        """The dim of attention heads in ``shape``, if each head is a matrix."""
        axes = self.spec.axes[int(self.of_experts) :]
        heads = [i for i, axis in enumerate(axes) if axis.endswith("heads")]
        return heads[0] if heads and self.per_head else None

    @property
    def rows(self) -> int:
        return math.prod(n for i, n in enumerate(self.shape[: self.spec.summed]) if i != self._head)

    @property
    def columns(self) -> int:
        heads = 1 if self._head is None else self.shape[self._head]
        return math.prod(self.shape) // (self.rows * heads)

    @property
    def cost(self) -> int:
        """The work of one matrix, in proportion to the multiplications of an iteration."""
        return math.prod(self.shape) * min(self.rows, self.columns)

    def exchange(self, layout: Layout) -> Exchange:
        """Return the exchange of this weight's matrices."""
        if layout.mesh is None:
            return Exchange(None, (), self.shape)
        first = int(self.of_experts)
        placements: list[Placement] = []
        for p in cast(DTensor, self.weight.data).placements:
            if isinstance(p, Shard) and first:
                p = Shard(p.dim - 1) if p.dim else EXPERTS
            placements.append(p)
        return Exchange(layout.mesh, tuple(placements), self.shape)

    def orthogonalized(self, whole: Tensor, iterations: int) -> Tensor:
        """Orthogonalise matrices that are given in the dims of the weight: ``[n, *shape]``."""
        order = list(range(1, whole.ndim))
        if self._head is not None:
            order.insert(0, order.pop(self._head))
        apart = whole.permute(0, *order)
        matrices = apart.reshape(-1, self.rows, self.columns)
        result = orthogonalized(matrices, iterations).view(apart.shape)
        return result.permute(0, *(1 + order.index(i) for i in range(1, whole.ndim)))


@dataclass(frozen=True)
class SharedWork:
    """Weights with matrices of one kind, which are exchanged together.

    ``slots``: the matrices of each owner, as indices into the matrices of all these weights."""

    exchange: Exchange
    weights: list[LinearWeight]
    slots: Slots


def dealt(weights: Sequence[LinearWeight], layout: Layout) -> list[SharedWork]:
    """Deal the matrices of all weights to their owners."""
    kinds: dict[Any, list[LinearWeight]] = {}
    for w in weights:
        kinds.setdefault((w.exchange(layout), w.rows, w.columns), []).append(w)
    slots = deal(
        {
            kind: Job(sum(w.count for w in ws), ws[0].cost, kind[0].owners)
            for kind, ws in kinds.items()
        }
    )
    return [SharedWork(kind[0], ws, slots[kind]) for kind, ws in kinds.items()]
