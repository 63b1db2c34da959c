"""Simple preference optimization (SimPO, Meng et al. 2024, arXiv:2405.14734, equation 6):

    loss = -log sigmoid(beta (s(chosen) - s(rejected)) - margin)

There is no reference: the score of an answer is its mean log-probability per token. The paper calls
the margin gamma.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from dtron.bounds import under
from dtron.losses.preference import Preference


@dataclass(frozen=True)
class SimPO(Preference):
    """Simple preference optimization. ``margin``: the margin of rewards that a pair is to have."""

    second_model: ClassVar[Literal["reference", "teacher"] | None] = None

    length_normalized: bool = field(default=True, init=False)
    margin: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        under(self, "loss", {"margin": float("inf")})

    def pair_loss(self, chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
        return -logsigmoid(self.beta * (chosen_P - rejected_P) - self.margin)
