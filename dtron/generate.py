"""Text from a model, with the same sharded forward that trains it.

Every new token runs the whole window again: no cache of keys and values, because this is for looking at a
model while it trains, on whatever mesh it trains on, and not for serving. All ranks draw the same token,
since all have the same logits and the same seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtron.config import ModelConfig
from dtron.dtensor import full
from dtron.mesh import Layout
from dtron.model import Transformer, make_batch, predict
from dtron.simulate import paused


@torch.no_grad()
def generate(
    params: Transformer,
    prompt: list[int],
    tokens: int,
    m: ModelConfig,
    layout: Layout,
    temperature: float = 0.8,
    seed: int = 0,
    data_ranks: int = 1,
    tp: int = 1,
    device: str = "cpu",
) -> list[int]:
    """``prompt`` and ``tokens`` new ones. Temperature 0 takes the likeliest. The window is the model's
    context at most; older tokens fall out of it."""
    window = min(-(-(len(prompt) + tokens) // tp) * tp, m.context // tp * tp)
    text, generator = list(prompt), torch.Generator().manual_seed(seed)
    for _ in range(tokens):
        seen = text[-window:]
        rows = torch.zeros(data_ranks, window + 1, dtype=torch.long)  # what comes after is not attended to
        rows[:, : len(seen)] = torch.tensor(seen)
        logits = full(predict(params, make_batch(rows.to(device), layout), m, layout))
        with paused():
            text.append(_pick(logits[len(seen) - 1].float().cpu(), temperature, generator))
    return text


def _pick(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator))
