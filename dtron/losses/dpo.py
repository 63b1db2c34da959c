"""Direct preference optimization (DPO, Rafailov et al. 2023, arXiv:2305.18290, equation 7):

    loss = -log sigmoid(beta (s(chosen) - s(rejected)))

With ``length_normalized``, a score is divided by the number of tokens of its answer (Tulu 3,
Lambert et al. 2024, arXiv:2411.15124, section 5.1). Long answers then have no advantage.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from dtron.losses.preference import Preference


@dataclass(frozen=True)
class DPO(Preference):
    """Direct preference optimization."""

    def pair_loss(self, chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
        return -logsigmoid(self.beta * (chosen_P - rejected_P))
