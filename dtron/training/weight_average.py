"""An exponential moving average of the weights (averages of weights: Polyak & Juditsky 1992,
"Acceleration of stochastic approximation by averaging"; Izmailov et al. 2018, arXiv:1803.05407).

    d = min(decay, (1 + n) / (10 + n))       n: the number of the update
    average = d average + (1 - d) w

The average of many weights has less of the noise of single batches, as after a decay of the rate.
The first updates have smaller d, because the initial weights should soon be forgotten.

``WeightAverage`` is an optimizer itself: it updates with another one, and then moves the average.
The average is one more tree of the state, ``ema``. So it is sharded as the weights, saved, resumed,
verified and counted like any state.

Left out: averages of several decays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dtron.distributed.redistribute import to_local
from dtron.mesh import Layout
from dtron.params import WeightSpec
from dtron.torch_compile import jit
from dtron.training.optimizer import OptimizerState, WrappedOptimizer
from dtron.training.state_formats import Stored, as_matrix, load, stored_weights
from dtron.training.update_scalars import UpdateScalars, like_scale
from dtron.tree import flat, tree_map

NAME = "ema"
"""the name of the average among the trees of the state"""


def move(average: Tensor, w: Stored, share: Tensor) -> None:
    """Move an average in place.

    ``share``: the share of w in the new average."""
    average.add_(share * (load(w) - average))


@dataclass(frozen=True)
class WeightAverage(WrappedOptimizer):
    """An optimizer that also keeps an average of the weights.

    ``decay``: the decay of the average, below 1."""

    decay: float
    kernel: Callable[..., None] = field(default=move, compare=False, repr=False)

    def init(self, spec: Any, params: Any) -> dict[str, Any]:
        return self.base.init(spec, params) | {NAME: tree_map(torch.clone, params)}

    def state_bytes(self, w: WeightSpec, shape: Sequence[int], element: int) -> int:
        return self.base.state_bytes(w, shape, element) + math.prod(shape) * element

    def compiled(self, backend: str = "inductor") -> WeightAverage:
        return replace(self, base=self.base.compiled(backend), kernel=jit(move, backend=backend))

    def update(
        self,
        spec: Any,
        params: Any,
        grads: Any,
        state: OptimizerState,
        scalars: UpdateScalars,
        layout: Layout,
    ) -> tuple[Any, OptimizerState]:
        trees = {name: tree for name, tree in state.trees.items() if name != NAME}
        self.base.update(spec, params, grads, replace(state, trees=trees), scalars, layout)
        scale, ok, step = scalars.scale, scalars.ok, scalars.step
        assert isinstance(scale, Tensor) and ok is not None and step is not None
        n = like_scale(scale, step)
        share = 1 - ((1 + n) / (10 + n)).clamp(max=self.decay)
        share = torch.where(ok, share, torch.zeros_like(share))  # a bad step changes nothing
        weights = stored_weights(spec, params, state.trees)
        for average, w in zip(flat(state.trees[NAME]), weights, strict=True):
            self.kernel(as_matrix(to_local(average)), w.local().as_matrix(), share)
        return params, state
