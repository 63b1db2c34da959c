"""Identity preference optimization (IPO, Azar et al. 2023, arXiv:2310.12036, equation 17):

    loss = (s(chosen) - s(rejected) - 1 / (2 beta))^2

The paper calls beta tau. The loss is bounded below by a margin, so it does not push the margin of a
pair without end. trl's ``loss_type="ipo"`` divides scores by the length of the answer: here this is
``length_normalized``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dtron.errors import UserError
from dtron.losses.preference import Preference


@dataclass(frozen=True)
class IPO(Preference):
    """Identity preference optimization."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta:
            raise UserError("--loss.beta 0: ipo divides by it; use --loss.beta 0.1")

    def pair_loss(self, chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
        return (chosen_P - rejected_P - 1 / (2 * self.beta)).square()
