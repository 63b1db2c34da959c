"""How the next token is drawn from logits.

The rules apply in this order, which is the order of transformers:

1. Repetition penalty (Keskar et al. 2019, arXiv:1909.05858, section 4.1): the logits of tokens that
   the text has already are divided by the penalty where they are positive, and multiplied by it
   where they are negative.
2. The temperature divides the logits.
3. Top-k keeps the k most likely tokens (Fan et al. 2018, arXiv:1805.04833).
4. Top-p keeps the smallest set of most likely tokens whose probabilities sum to ``top_p`` (Holtzman
   et al. 2019, arXiv:1904.09751, section 3.1).
5. Min-p keeps the tokens that have at least ``min_p`` times the probability of the most likely one
   (Nguyen et al. 2024, arXiv:2407.01082).

One random number per token decides: a token is drawn where the cumulative probability passes it.
Each text has a generator of its own. So a text depends neither on the other texts of its batch nor
on the mesh. All ranks draw the same tokens, because they have the same logits and the same numbers.

Everything runs where the logits are. The host reads nothing but the drawn tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dtron.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token of one text is drawn. Raises UserError for options that no text can be
    drawn with.

    ``temperature``: divides the logits; 0 takes the most likely token.
    ``top_p``: the probability of the tokens to draw from; 1: all tokens.
    ``seed``: of the random generator.
    ``top_k``: the number of most likely tokens to draw from; 0: all tokens.
    ``min_p``: the least probability of a token, relative to the most likely one.
    ``repetition_penalty``: makes tokens of the text less likely; 1: no penalty."""

    temperature: float = 0.8
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(
                f"--temperature {self.temperature}: must be 0 (the most likely token) or more; "
                "change it"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(
                f"--top-p {self.top_p}: must be over 0 and at most 1 (all tokens); change it"
            )
        if not -(2**63) <= self.seed < 2**64:
            raise UserError(f"--seed {self.seed}: must fit in 64 bits; choose a smaller one")
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k}: must be 0 (all tokens) or more; change it")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"--min-p {self.min_p}: must be from 0 (all tokens) to 1; change it")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(
                f"--repetition-penalty {self.repetition_penalty}: must be over 0; 1 is no penalty; "
                "change it"
            )


def draw_tokens(
    logits_BV: Tensor,
    samplings: Sequence[Sampling],
    uniform_B: Tensor,
    texts: Sequence[Sequence[int]] = (),
) -> Tensor:
    """Draw one token for each row, ``[B]``; -1 if the row's logits are not finite.

    ``samplings``: of each row.
    ``uniform_B``: a random number of each row, from 0 to 1, in float64.
    ``texts``: the tokens of each row so far, for the repetition penalty."""
    finite_B = logits_BV.amax(-1).isfinite()  # a word of the padding has -inf
    logits_BV = penalised(logits_BV, samplings, texts)
    drawn_B = logits_BV.argmax(-1)
    if any(s.temperature > 0 for s in samplings):
        p_BV, order_BV = probabilities(logits_BV.masked_fill(~finite_B[:, None], 0.0), samplings)
        greedy_B = _numbers([s.temperature == 0 for s in samplings], logits_BV)
        drawn_B = torch.where(greedy_B.bool(), drawn_B, _inverse(p_BV, order_BV, uniform_B))
    return torch.where(finite_B, drawn_B, -1)


def penalised(
    logits_BV: Tensor, samplings: Sequence[Sampling], texts: Sequence[Sequence[int]]
) -> Tensor:
    """Apply the repetition penalty."""
    if all(s.repetition_penalty == 1 for s in samplings):
        return logits_BV
    longest = max(map(len, texts))
    # A text is padded with its own last token, which counts once like every other token.
    padded = [[*text, *[text[-1]] * (longest - len(text))] for text in texts]
    texts_BS = torch.tensor(padded, device=logits_BV.device)
    penalty_B1 = _numbers([s.repetition_penalty for s in samplings], logits_BV)[:, None]
    seen_BS = logits_BV.gather(1, texts_BS)
    seen_BS = torch.where(seen_BS < 0, seen_BS * penalty_B1, seen_BS / penalty_B1)
    return logits_BV.scatter(1, texts_BS, seen_BS.to(logits_BV.dtype))


def probabilities(logits_BV: Tensor, samplings: Sequence[Sampling]) -> tuple[Tensor, Tensor | None]:
    """Return the probabilities that tokens are drawn with, in float64, up to a factor for each row;
    and the token of each of them (None: in order)."""
    order_BV, top = None, logits_BV.amax(-1, keepdim=True)
    if any(s.top_p < 1 or s.top_k for s in samplings):
        logits_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
    # The largest logit becomes 0, so a tiny temperature makes the others -inf and not all of them
    # inf. In float64 neither a tiny temperature nor a tiny top_p rounds to 0.
    temperature_B = _numbers([s.temperature or 1.0 for s in samplings], logits_BV)
    scaled_BV = (logits_BV.double() - top.double()) / temperature_B[:, None]
    if order_BV is not None:
        vocab = logits_BV.shape[1]
        last = [min(s.top_k or vocab, vocab) - 1 for s in samplings]
        last_B1 = torch.tensor(last, device=logits_BV.device)[:, None]
        least_B1 = scaled_BV.gather(1, last_B1)  # tokens as likely as the last one stay too
        scaled_BV = scaled_BV.masked_fill(scaled_BV < least_B1, float("-inf"))
    p_BV = scaled_BV.softmax(-1)
    if order_BV is not None:
        # The probability of the more likely tokens. It is 0 for the most likely token, which is
        # therefore never masked.
        before_BV = p_BV.cumsum(-1) - p_BV
        top_p_B1 = _numbers([s.top_p for s in samplings], logits_BV)[:, None]
        p_BV = p_BV.masked_fill((before_BV >= top_p_B1) & (top_p_B1 < 1), 0.0)
    if any(s.min_p for s in samplings):
        min_p_B1 = _numbers([s.min_p for s in samplings], logits_BV)[:, None]
        p_BV = p_BV.masked_fill(p_BV < min_p_B1 * p_BV.amax(-1, keepdim=True), 0.0)
    return p_BV, order_BV


def _inverse(p_BV: Tensor, order_BV: Tensor | None, uniform_B: Tensor) -> Tensor:
    """Return the token at which the cumulative probability passes the random number."""
    cumulative_BV = p_BV.cumsum(-1)
    total_B1 = cumulative_BV[:, -1:]
    place_B1 = torch.minimum(
        uniform_B[:, None] * total_B1, total_B1.nextafter(total_B1.new_zeros(1))
    )
    # A token of probability 0 is never drawn: the sum before it is not smaller than its own.
    drawn_B1 = torch.searchsorted(cumulative_BV, place_B1, right=True)
    return (drawn_B1 if order_BV is None else order_BV.gather(1, drawn_B1))[:, 0]


def _numbers(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)
