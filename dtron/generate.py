"""Text from a model, with the same sharded forward that trains it; ``python -m dtron.generate --help``.

The prompts are run at once, padded on the right, and then every step runs one token of each row. Keys and
values of what was before are in a cache that travels beside the weights (layers/past.py), so the layers are
those of training, on whatever mesh. All ranks draw the same tokens, since all have the same logits and the
same seed. Rows are filled up until every rank has as many tokens, which the sharding of tokens asks for.

Sampling: the temperature divides the logits, and top-p (Holtzman et al. 2019, arXiv:1904.09751, section 3.1)
draws from the fewest tokens that have this probability together. Left out: everything that serving needs,
as pages of cache, rows that come and go, and speculation.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence, Set
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dtron.config import ModelConfig
from dtron.dtensor import full
from dtron.layers.past import Past, empty_past
from dtron.mesh import Layout
from dtron.model import Transformer, embed, make_batch, stage_logits
from dtron.params import gather
from dtron.pipeline import Pipeline
from dtron.schedules.run import Program
from dtron.simulate import paused
from dtron.step import evaluate


@torch.no_grad()
def generate(
    params: tuple[Transformer, ...],
    prompts: Sequence[Sequence[int]],
    tokens: int,
    m: ModelConfig,
    pipe: Pipeline,
    temperature: float = 0.8,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
    ends: Set[int] = frozenset(),
) -> list[list[int]]:
    """Every prompt and ``tokens`` new ones, or fewer where one of ``ends`` comes, which is the row's last.
    Temperature 0 takes the likeliest. Raises ValueError for a prompt that is empty or leaves no room in the
    model's context."""
    longest = check_prompts(prompts, tokens, m)
    step = Decoder(params, len(prompts), longest + tokens, m, pipe, device)
    texts, generator = [list(p) for p in prompts], torch.Generator().manual_seed(seed)
    new, open_rows = [list(p) for p in prompts], set(range(len(prompts)))
    for _ in range(tokens):
        logits_BV = step(new, [len(text) - len(row) for text, row in zip(texts, new, strict=True)])
        with paused():
            drawn = torch.zeros(len(prompts))
            if logits_BV is not None:
                drawn = pick(logits_BV, temperature, top_p, generator)
            drawn = pipe.sum(drawn.to(device)).tolist()  # from the last stage to all
        new = [[int(token)] for token in drawn]
        for row in list(open_rows):
            texts[row] += new[row]
            if new[row][0] in ends:
                open_rows.remove(row)
        for row in set(range(len(prompts))) - open_rows:
            new[row] = texts[row][-1:]  # its last token again, in its slot
        if not open_rows:
            break
    return texts


class Decoder:
    """The model and what it has seen of ``rows`` texts, of up to ``slots`` tokens."""

    def __init__(
        self,
        params: tuple[Transformer, ...],
        rows: int,
        slots: int,
        m: ModelConfig,
        pipe: Pipeline,
        device: str,
    ):
        layout, unit = pipe.layout, pipe.layout.parts("tokens_sp")
        self._rows, self._filled = rows, -(-rows // unit) * unit
        self._m, self._pipe, self._device = m, pipe, device
        weights = gather(params, layout)
        heads, axis = (m.heads, "heads") if m.latent else (m.kv_heads, "kv_heads")
        dtype = weights[0].blocks[0].norm_1.scale.dtype
        new = partial(empty_past, self._filled, slots, heads, m.head_dims, axis, layout, dtype, device)
        self._weights = [(p, tuple(new() for _ in p.blocks)) for p in weights]

    def __call__(self, new: Sequence[Sequence[int]], starts: Sequence[int]) -> Tensor | None:
        """``new`` tokens of each row, of which the first has position ``starts[row]`` -> the logits after
        them, ``[rows, vocab]``; None on ranks without the last stage."""
        longest, fill = max(map(len, new)), self._filled - self._rows
        width = lambda row: [*row, *[0] * (longest - len(row) + 1)]  # the last is a target, which nobody asks
        tokens = torch.tensor([width(row) for row in [*new, *[[0]] * fill]])
        first = torch.tensor([*starts, *[0] * fill])
        places = first[:, None] + torch.arange(longest)
        last = torch.tensor([len(row) - 1 for row in new] + [0] * fill)
        layout = self._pipe.layout
        tokens, places, last = (x.to(self._device) for x in (tokens, places, last))
        batch = make_batch(tokens, layout, positions_BS=places)
        functions = _functions(self._m, layout, layout.shard(last, "tokens"))
        found = evaluate(functions, self._weights, [batch], self._pipe)
        return None if found is None else full(found)[: self._rows].float().cpu()


def _functions(m: ModelConfig, layout: Layout, last_B: Tensor) -> Program:
    """The model's, for stages whose params are pairs of weights and past."""

    def enter(p: tuple[Transformer, tuple[Past, ...]], batch: Any) -> Tensor:
        return embed(p[0], batch, m, layout)

    def run(p: tuple[Transformer, tuple[Past, ...]], x_TD: Tensor, batch: Any) -> tuple[Tensor, None]:
        return stage_logits(p[0], x_TD, batch, m, layout, p[1], last_B)

    return Program(enter, run)


def pick(logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token for each row."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    odds, order = (logits_BV / temperature).softmax(-1).sort(dim=-1, descending=True)
    before = odds.cumsum(-1) - odds  # the likeliest has nothing before it, so it is never left out
    odds = odds.masked_fill(before >= top_p, 0.0)
    return order.gather(1, torch.multinomial(odds, 1, generator=generator))[:, 0]


def check_prompts(prompts: Sequence[Sequence[int]], tokens: int, m: ModelConfig) -> int:
    """The longest's length; ValueError for what cannot be gone on from."""
    if not prompts or not all(prompts):
        raise ValueError("--prompt: a prompt has no tokens; give at least one word")
    largest = max(map(max, prompts))
    if largest >= m.vocab:
        raise ValueError(
            f"--prompt: has token {largest}, the model {m.vocab} of them; give the model's own tokenizer"
        )
    longest = max(map(len, prompts))
    if longest + tokens > m.context:
        raise ValueError(
            f"--tokens {tokens} after a prompt of {longest}: the model's context is {m.context}; use "
            + (f"--tokens {m.context - longest}" if longest < m.context else "a shorter prompt")
        )
    return longest


if __name__ == "__main__":
    from dtron.entry import run_cli
    from dtron.generating import main

    sys.exit(run_cli(main, sys.argv[1:]))
