"""Log-probabilities of given tokens under a model, on any mesh: what trainers of reinforcement
learning ask for beside generation.

``log_probs`` computes them without gradients, through the pipeline. A loss of log-probabilities is
an ``Objective`` (losses/objective.py): it calls ``token_log_probs`` and ``sequence_sums``, which
are differentiable, and trains through the pipeline like any other loss. losses/preference.py is an
example.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtron.distributed.redistribute import full
from dtron.layers.cross_entropy import IGNORE
from dtron.layers.token_log_probs import token_log_probs
from dtron.layers.token_order import as_rows
from dtron.model.batch import Batch
from dtron.model.config import ModelConfig
from dtron.model.head import loss_options
from dtron.model.transformer import embed, stage_then
from dtron.schedules.runner import Program
from dtron.training.gradients import forwards
from dtron.training.pipeline import Pipeline


class LogProbs(NamedTuple):
    """Log-probabilities of the targets of a microbatch, on every rank of the last stage.

    ``tokens_BS``: of each target; 0 where the target is IGNORE.
    ``rows_B``: of each row, the sum over its targets.
    ``counts_B``: the number of targets of each row that count."""

    tokens_BS: Tensor
    rows_B: Tensor
    counts_B: Tensor


@torch.no_grad()
def log_probs(
    weights: Any, microbatches: Sequence[Batch], m: ModelConfig, pipe: Pipeline
) -> list[LogProbs]:
    """Return the log-probabilities of each microbatch, in float32 at least; an empty list on a rank
    without the last stage. Every rank calls this.

    ``weights``: the trees of this process's stages, as in ``evaluate``.
    ``microbatches``: from ``make_batch``; ``counted_BS`` says which targets count."""
    layout = pipe.layout

    def stage(p: Any, x_TD: Tensor, batch: Batch) -> tuple[Any, None]:
        def end(x_TD: Tensor, w_head: Tensor) -> Tensor:
            return token_log_probs(x_TD, w_head, batch.targets_T, loss_options(m), layout)

        return stage_then(p, x_TD, batch, end, m, layout)

    functions = Program(partial(embed, m=m, layout=layout), stage)
    found = forwards(functions, weights, microbatches, pipe)
    return [
        _by_row(x_T, b, pipe) for x_T, b in zip(found, microbatches if found else (), strict=True)
    ]


def _by_row(log_probs_T: Tensor, batch: Batch, pipe: Pipeline) -> LogProbs:
    def rows(x_T: Tensor) -> Tensor:
        return as_rows(full(x_T), pipe.layout, batch.seq_len, batch.zigzag)

    tokens_BS = rows(log_probs_T)
    return LogProbs(tokens_BS, tokens_BS.sum(1), (rows(batch.targets_T) != IGNORE).sum(1))
