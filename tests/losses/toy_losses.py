from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dtron.losses.preference import Preference


@dataclass(frozen=True)
class Hinge(Preference):
    """The hinge loss of pairs (Zhao et al. 2023, arXiv:2305.10425)."""

    def pair_loss(self, chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
        """Return the loss of each pair."""
        return (1 - self.beta * (chosen_P - rejected_P)).relu()
