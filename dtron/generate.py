"""Text from a model, with the same sharded forward that trains it.

Every new token runs the whole window again: no cache of keys and values, because this is for looking at a
model while it trains, on whatever mesh it trains on, and not for serving. All ranks draw the same token,
since all have the same logits and the same seed.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dtron.config import ModelConfig
from dtron.dtensor import full
from dtron.model import Transformer, embed, make_batch, stage_logits
from dtron.order import as_rows
from dtron.params import gather
from dtron.pipeline import Pipeline
from dtron.schedules.run import Program
from dtron.simulate import paused
from dtron.step import evaluate


@torch.no_grad()
def generate(
    params: tuple[Transformer, ...],
    prompt: list[int],
    tokens: int,
    m: ModelConfig,
    pipe: Pipeline,
    temperature: float = 0.8,
    seed: int = 0,
    data_ranks: int = 1,
    unit: int = 1,
    device: str = "cpu",
) -> list[int]:
    """``prompt`` and ``tokens`` new ones. Temperature 0 takes the likeliest. The window is the model's
    context at most; older tokens fall out of it. ``unit``: what its length must be a multiple of, see
    ``checks.sequence_unit``."""
    window = min(-(-(len(prompt) + tokens) // unit) * unit, m.context // unit * unit)
    weights = gather(params, pipe.layout)
    functions = Program(
        partial(embed, m=m, layout=pipe.layout), partial(stage_logits, m=m, layout=pipe.layout)
    )
    text, generator = list(prompt), torch.Generator().manual_seed(seed)
    for _ in range(tokens):
        seen = text[-window:]
        rows = torch.zeros(data_ranks, window + 1, dtype=torch.long)  # what comes after is not attended to
        rows[:, : len(seen)] = torch.tensor(seen)
        batch = make_batch(rows.to(device), pipe.layout)
        found = evaluate(functions, weights, [batch], pipe)
        with paused():
            token = None
            if found is not None:
                logits_BSV = as_rows(full(found), pipe.layout, window, batch.zigzag)
                logits_V = logits_BSV[0, len(seen) - 1].float().cpu()
                token = _pick(logits_V, temperature, generator).to(device)
            text.append(int(pipe.sum(token)))  # from the last stage to all
    return text


def _pick(logits_V: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits_V.argmax()
    return torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator)[0]
