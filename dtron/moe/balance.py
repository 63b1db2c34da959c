"""The rule that evens out the load of experts without a loss.

Once a step the bias of each expert goes up by ``rate`` where the expert had fewer tokens than the
mean, and down where it had more (Wang et al. 2024, arXiv:2408.15664, algorithm 1). The router adds
the bias to the scores that choose experts, and not to the weights of the sum. A bias is kept with
the weights, so that a checkpoint has it, on any mesh.
"""

from __future__ import annotations

from torch import Tensor


def bias_step(load_E: Tensor, rate: float) -> Tensor:
    """``[E]``: what is added to the bias of each expert, given its tokens in the whole global batch."""
    return rate * (load_E.mean() - load_E).sign()
