"""The log-probability that a model gives to texts, on any mesh.

A batch has rows of different texts, padded on the right, which no earlier token sees. Each row has
tokens that are only context and tokens that count. The last stage reduces the logits of its tokens
to two numbers, the target's log-probability and whether it is the most likely token, so only these
leave the ranks. Rows are sorted by length, so that little is padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtron.distributed.redistribute import full
from dtron.distributed.simulated_ranks import paused
from dtron.layers.cross_entropy import IGNORE
from dtron.mesh import by_rows
from dtron.model.batch import Batch, make_batch
from dtron.model.config import ModelConfig
from dtron.model.transformer import Transformer, embed, stage_logits
from dtron.params import unshard
from dtron.schedules.runner import Program
from dtron.training.gradients import evaluate
from dtron.training.pipeline import Pipeline

LOGITS = 2**28
"""most logits of a rank at once: 1 GiB in float32"""


class Scored(NamedTuple):
    """The score of a text.

    ``log_probability``: the sum over its tokens that count, in nats.
    ``greedy``: whether each of these tokens is the most likely one."""

    log_probability: float
    greedy: bool


class Text(NamedTuple):
    """Tokens of which the last ``counted`` count. There is at least one token before them."""

    tokens: Sequence[int]
    counted: int


class Scorer:
    """A model that scores texts. Every rank makes it and calls it."""

    def __init__(
        self, params: tuple[Transformer, ...], m: ModelConfig, pipe: Pipeline, device: str
    ):
        self._layout = by_rows(pipe.layout)
        self._m, self._pipe, self._device = m, pipe, device
        self._weights = unshard(params, self._layout)
        self._functions = _functions(m, self._layout)

    def __call__(self, texts: Sequence[Text]) -> list[Scored]:
        """Score texts. A text that is longer than the model's context loses its first tokens."""
        longest = self._m.context + 1
        texts = [Text(t.tokens[-longest:], min(t.counted, longest - 1)) for t in texts]
        scores: dict[int, Scored] = {}
        with torch.no_grad():
            for members in self._batches(texts):
                rows = self._scores([texts[i] for i in members])
                scores |= zip(members, rows, strict=True)
        return [scores[i] for i in range(len(texts))]

    def _batches(self, texts: Sequence[Text]) -> Iterator[list[int]]:
        """Yield the indices of texts of about one length, as many as the logits allow."""
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i].tokens))
        tokens = LOGITS // self._m.padded_vocab * self._layout.parts("tokens")
        while order:
            count = max(1, tokens // max(1, len(texts[order[0]].tokens)))
            yield order[:count]
            order = order[count:]

    def _scores(self, texts: Sequence[Text]) -> list[Scored]:
        unit = self._layout.parts("tokens_sp")
        longest, rows = max(len(t.tokens) for t in texts), -(-len(texts) // unit) * unit
        tokens = torch.full((rows, longest), 0)
        counted = torch.zeros(rows, longest - 1, dtype=torch.bool)
        for i, (row, n) in enumerate(texts):
            tokens[i, : len(row)] = torch.tensor(row)
            counted[i, len(row) - 1 - n : len(row) - 1] = True
        with paused():  # all ranks have the same rows
            tokens, counted = tokens.to(self._device), counted.to(self._device)
        batch = make_batch(tokens, self._layout, counted_BS=counted)
        found = evaluate(self._functions, self._weights, [batch], self._pipe)
        with paused():
            sums_B2 = torch.zeros(rows, 2, dtype=torch.float64, device=self._device)
            if found is not None:
                sums_B2 = full(found).double().view(rows, -1, 2).sum(1)
            # From the last stage to all ranks.
            pairs = self._pipe.sum(sums_B2).tolist()
        return [Scored(log, not wrong) for log, wrong in pairs[: len(texts)]]


def _functions(m: ModelConfig, layout: Any) -> Program:
    """Return the model's functions, of which the last one returns ``[T@tokens, 2]``: the target's
    log-probability, and 1 if another token is more likely."""

    def enter(p: Transformer, batch: Batch) -> Tensor:
        return embed(p, batch, m, layout)

    def run(p: Transformer, x_TD: Tensor, batch: Batch) -> tuple[Tensor, None]:
        y, _ = stage_logits(p, x_TD, batch, m, layout)
        if p.norm is None:
            return y, None
        region = layout.local_map(_score, (("tokens", None), ("tokens",)), ("tokens", None))
        return region(y, batch.targets_T), None

    return Program(enter, run)


def _score(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    counts_T = targets_T != IGNORE
    place_T1 = targets_T.clamp(min=0)[:, None]
    target_T = logits_TV.gather(1, place_T1)[:, 0]
    log_T = (target_T - logits_TV.logsumexp(-1)) * counts_T
    wrong_T = (logits_TV.argmax(-1) != place_T1[:, 0]) & counts_T
    return torch.stack([log_T, wrong_T.to(log_T.dtype)], -1)
