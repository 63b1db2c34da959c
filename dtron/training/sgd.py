"""Stochastic gradient descent with momentum (Sutskever et al. 2013,
https://proceedings.mlr.press/v28/sutskever13.html), as ``torch.optim.SGD`` computes it.

    m = momentum m + g + decay w
    w = w - lr m                        with Nesterov: w - lr (momentum m + g + decay w)

Transformers learn slowly with it. It is here for comparison, and as the shortest optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dtron.bounds import under
from dtron.params import WeightSpec
from dtron.training.elementwise_optimizer import ElementwiseOptimizer


@dataclass(frozen=True)
class SGD(ElementwiseOptimizer):
    """SGD with momentum. Its state is ``momentum``: a sum of gradients, where ``m`` of the other
    optimizers is a mean.

    ``weight_decay``: the weight decay of matrices, added to the gradient; norms and biases have
        none.
    ``momentum``: the decay of the momentum.
    ``nesterov``: whether the update looks one step ahead."""

    weight_decay: float
    momentum: float = 0.9
    nesterov: bool = False

    state_names = ("momentum",)

    def __post_init__(self) -> None:
        under(self, "optim", {"momentum": 1, "weight_decay": float("inf")})

    def width_rate(self, w: WeightSpec) -> float:
        return w.growth.gradient_rate

    def rule(
        self, w: Tensor, g: Tensor, state: tuple[Tensor, ...], lr: Tensor, *terms: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        (m,) = state
        g = g + self.weight_decay * w
        m = self.momentum * m + g
        return w - lr * (self.momentum * m + g if self.nesterov else m), (m,)
