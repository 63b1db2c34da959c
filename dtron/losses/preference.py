"""The base of losses of pairs of answers: a chosen and a rejected answer to one prompt.

The score of an answer y to x is the logarithm of its probability, over that of a frozen reference:

    s(y) = log pi(y | x) - log pi_ref(y | x)

Both are sums over the tokens of y. If ``length_normalized``, both are divided by the number of
these tokens, |y|. A loss is a function of the two scores of a pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dtron.bounds import under
from dtron.layers.cross_entropy import Loss
from dtron.layers.token_log_probs import token_log_probs
from dtron.losses.objective import LossInputs, Objective
from dtron.losses.sequence_sums import sequence_sums, summand
from dtron.mesh import Layout

STATS = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")


@dataclass(frozen=True)
class Preference(Objective):
    """A loss of pairs. ``beta``: a reward is beta times a score."""

    sequences: ClassVar[bool] = True
    second_model: ClassVar[Literal["reference", "teacher"] | None] = "reference"

    beta: float = 0.1
    length_normalized: bool = False

    def __post_init__(self) -> None:
        under(self, "loss", {"beta": float("inf")})

    def pair_loss(self, chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
        """Return the loss of each pair, given the scores of its answers."""
        raise NotImplementedError

    def stats(self, options: Loss) -> tuple[str, ...]:
        return STATS

    def __call__(
        self, x_TD: Tensor, w_head: Tensor, inputs: LossInputs, options: Loss, layout: Layout
    ) -> tuple[Tensor, ...]:
        log_probs_T = token_log_probs(x_TD, w_head, inputs.targets_T, options, layout)
        slots = inputs.slots

        def on_rank(
            log_probs_T: Tensor, targets_T: Tensor, sequences_T: Tensor, *reference_N: Tensor
        ) -> tuple[Tensor, ...]:
            sums = sequence_sums(log_probs_T, targets_T, sequences_T, slots, layout)
            totals = self._totals(*sums.unbind(), *reference_N)
            return tuple(summand(x, layout) for x in totals)

        tokens = ("tokens",)
        ins = [tokens, tokens, tokens, *[("rows",)] * len(inputs.reference)]
        region = layout.local_map(on_rank, ins, [("+tokens",)] * (1 + len(STATS)))
        return region(log_probs_T, inputs.targets_T, inputs.sequences_T, *inputs.reference)

    def reference(
        self, x_TD: Tensor, w_head: Tensor, inputs: LossInputs, options: Loss, layout: Layout
    ) -> tuple[Tensor, ...]:
        """Return the log-probability of each slot's sequence, ``[slots@rows]``."""
        log_probs_T = token_log_probs(x_TD, w_head, inputs.targets_T, options, layout)
        slots = inputs.slots

        def on_rank(log_probs_T: Tensor, targets_T: Tensor, sequences_T: Tensor) -> Tensor:
            return sequence_sums(log_probs_T, targets_T, sequences_T, slots, layout)[0]

        region = layout.local_map(on_rank, [("tokens",)] * 3, ("rows",))
        return (region(log_probs_T, inputs.targets_T, inputs.sequences_T),)

    def _totals(
        self, log_prob_N: Tensor, count_N: Tensor, reference_N: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return the loss and the statistics, summed over the pairs of this data rank."""
        score_N = log_prob_N if reference_N is None else log_prob_N - reference_N
        if self.length_normalized:
            score_N = score_N / count_N.clamp(min=1)
        score_P2 = score_N.view(-1, 2)
        valid_P = (count_N.view(-1, 2) > 0).all(-1)
        chosen_P, rejected_P = score_P2.unbind(-1)
        loss = torch.where(valid_P, self.pair_loss(chosen_P, rejected_P), 0).sum()
        chosen_P, rejected_P = chosen_P.detach() * valid_P, rejected_P.detach() * valid_P
        rewards = [self.beta * x.sum() for x in (chosen_P, rejected_P, chosen_P - rejected_P)]
        right = (valid_P & (chosen_P > rejected_P)).to(loss.dtype).sum()
        return loss, *rewards, right
