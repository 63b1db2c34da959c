"""The rule that balances the load of experts without a loss.

Once a step the bias of each expert increases by ``rate`` if the expert had fewer tokens than the
mean, and decreases by ``rate`` if the expert had more (Wang et al. 2024, arXiv:2408.15664,
algorithm 1). The router adds the bias to the scores that choose experts, and not to the weights of
the sum. Biases are stored with the weights, so a checkpoint contains them, on any mesh.
"""

from __future__ import annotations

from torch import Tensor


def bias_step(load_E: Tensor, rate: float) -> Tensor:
    """Return ``[E]``, the increment of each expert's bias.

    ``load_E``: each expert's tokens in the whole global batch."""
    return rate * (load_E.mean() - load_E).sign()
