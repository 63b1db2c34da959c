"""Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2): each element moves by the rate, in the
direction of the sign of a momentum.

    u = sign(beta1 m + (1 - beta1) g)
    w = (1 - lr decay) w - lr u
    m = beta2 m + (1 - beta2) g

Its state is m alone. Every update has the size of the rate, so its rate is 3 to 10 times smaller
than AdamW's, and its decay larger by the same factor (section 5 of the paper).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dtron.bounds import under
from dtron.params import WeightSpec
from dtron.training.elementwise_optimizer import ElementwiseOptimizer


@dataclass(frozen=True)
class Lion(ElementwiseOptimizer):
    """Lion. Its state is ``m``, a momentum of the gradient.

    ``beta1``: the decay of the momentum in the update.
    ``beta2``: the decay of the stored momentum.
    ``weight_decay``: the weight decay of matrices; norms and biases have none."""

    beta1: float
    beta2: float
    weight_decay: float

    state_names = ("m",)

    def __post_init__(self) -> None:
        under(self, "optim", {"beta1": 1, "beta2": 1, "weight_decay": float("inf")})

    def width_rate(self, w: WeightSpec) -> float:
        return w.growth.sign_rate

    def rule(
        self, w: Tensor, g: Tensor, state: tuple[Tensor, ...], lr: Tensor, *terms: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        (m,) = state
        update = (self.beta1 * m + (1 - self.beta1) * g).sign()
        return w * (1 - lr * self.weight_decay) - lr * update, (
            self.beta2 * m + (1 - self.beta2) * g,
        )
