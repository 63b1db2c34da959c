"""Two optimizers in one file: SGD, as CONTRIBUTING.md shows it, and one that is not elementwise.

``registered`` gives them names. Then every program knows them: training on any mesh, checkpoints,
``dtron show``, ``dtron verify`` and the flags. Beside the optimizers are the mutants that a test
must catch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dtron.bounds import under
from dtron.distributed.redistribute import full, like, to_local
from dtron.mesh import Layout
from dtron.params import WeightSpec
from dtron.training.elementwise_optimizer import ElementwiseOptimizer
from dtron.training.optim_config import OPTIMIZERS
from dtron.training.optimizer import Optimizer
from dtron.training.state_formats import overwrite
from dtron.training.update_scalars import UpdateScalars
from dtron.tree import flat, tree_map


@dataclass(frozen=True)
class SGD(ElementwiseOptimizer):
    """SGD with momentum, as in torch.optim.SGD."""

    weight_decay: float
    momentum: float = 0.9

    state_names = ("momentum",)

    def __post_init__(self) -> None:
        under(self, "optim", {"momentum": 1})

    def rule(
        self, w: Tensor, g: Tensor, state: tuple[Tensor, ...], lr: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        (m,) = state
        m = self.momentum * m + g + self.weight_decay * w
        return w - lr * m, (m,)


@dataclass(frozen=True)
class NormalizedSGD(Optimizer):
    """Matrices move along their momentum, divided by its norm. All other weights move along their
    gradient and have no state. The norm is of the whole matrix, so the update communicates."""

    momentum: float = 0.9

    def _is_matrix(self, w: WeightSpec) -> bool:
        return len(w.axes) > 1 and not w.buffer

    def init(self, spec: Any, params: Any) -> dict[str, Any]:
        state = lambda w, x: torch.zeros_like(x) if self._is_matrix(w) else None
        return {"momentum": tree_map(state, spec, params)}

    def state_bytes(self, w: WeightSpec, shape, element: int) -> int:
        return element * torch.Size(shape).numel() if self._is_matrix(w) else 0

    def update(self, spec, params, grads, state, scalars: UpdateScalars, layout: Layout):
        copies = flat(state.compute_copies) or [None] * len(flat(params))
        momenta = iter(flat(state.trees["momentum"]))
        for w, p, g, copy in zip(flat(spec), flat(params), flat(grads), copies, strict=True):
            if w.buffer:
                continue
            old, new = [to_local(p)], [to_local(g).to(p.dtype) * scalars.scale]
            if self._is_matrix(w):
                m = next(momenta)
                old.append(to_local(m))
                new.append(self.momentum * to_local(m) + new[0])
                whole = full(like(m, new[1]))
                new[0] = to_local(layout.shard(whole / whole.norm(), *w.axes))
            new[0] = old[0] - scalars.lr * new[0]
            overwrite(old, new, scalars.ok)
            if copy is not None:
                to_local(copy).copy_(to_local(p))
        return params, state


@dataclass(frozen=True)
class NoMomentum(SGD):
    """A mutant: the momentum is not multiplied."""

    def rule(self, w, g, state, lr):
        (m,) = state
        return super().rule(w, g, (m / self.momentum,), lr)


@dataclass(frozen=True)
class ShardMean(SGD):
    """A mutant: not elementwise, it sees the mean of a rank's shard."""

    def rule(self, w, g, state, lr):
        return super().rule(w, g - g.mean(), state, lr)


@dataclass(frozen=True)
class ShardNorm(NormalizedSGD):
    """A mutant: the norm is that of a rank's shard."""

    def update(self, spec, params, grads, state, scalars, layout):
        with mock.patch(f"{__name__}.full", to_local), mock.patch.object(Layout, "shard", _first):
            return super().update(spec, params, grads, state, scalars, layout)


def _first(layout: Layout, x: Tensor, *axes: str) -> Tensor:
    return x


ALL = {
    "my-sgd": SGD,
    "normalized-sgd": NormalizedSGD,
    "no-momentum": NoMomentum,
    "shard-mean": ShardMean,
    "shard-norm": ShardNorm,
}
BOTH = ("my-sgd", "normalized-sgd")


@contextmanager
def registered() -> Iterator[None]:
    with mock.patch.dict(OPTIMIZERS, ALL):
        yield
