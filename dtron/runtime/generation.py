"""Generates text with the same sharded forward that trains.

The first step runs all prompts together, padded on the right. Each later step runs one token of
each row. The caches of the mixers (for attention: layers/kv_cache.py) are passed beside the
weights, so generation runs the layers of training, on any mesh without cp. All ranks draw the same
tokens, because they have the same logits and the same seed. Sharded tokens need the same number of
rows on every rank, so rows of padding are added.

Sampling: the temperature divides the logits. Top-p (Holtzman et al. 2019, arXiv:1904.09751, section
3.1) draws from the smallest set of most likely tokens whose probabilities sum to ``top_p``. Left
out: the needs of serving, such as a paged cache, continuous batching and speculative decoding.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dtron.data import Data
from dtron.distributed.redistribute import full
from dtron.distributed.simulated_ranks import paused
from dtron.errors import UserError
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.block import Block
from dtron.model.config import ModelConfig
from dtron.model.transformer import Transformer, embed, stage_logits
from dtron.params import unshard
from dtron.runtime.config import RunConfig
from dtron.schedules.runner import Program
from dtron.training.config import RunPlan
from dtron.training.gradients import evaluate
from dtron.training.pipeline import Pipeline, one_stage
from dtron.tree import flat


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    ``temperature``: divides the logits; 0 takes the most likely token.
    ``top_p``: the probability of the tokens to draw from.
    ``seed``: of the random generator."""

    temperature: float = 0.8
    top_p: float = 1.0
    seed: int = 0


@torch.no_grad()
def generate(
    params: tuple[Transformer, ...],
    prompts: Sequence[Sequence[int]],
    tokens: int,
    m: ModelConfig,
    pipe: Pipeline,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    device: str = "cpu",
    ends: Set[int] = frozenset(),
) -> list[list[int]]:
    """Return every prompt with its continuation. Raises UserError for a prompt that is empty or
    leaves no room in the model's context, and for logits that are not finite.

    ``tokens``: maximum number of new tokens in each row.
    ``ends``: tokens that end a row. The end token is the row's last."""
    longest = check_prompts(prompts, tokens, m)
    step = Decoder(params, len(prompts), longest + tokens, m, pipe, device)
    texts, generator = [list(p) for p in prompts], torch.Generator().manual_seed(sampling.seed)
    new, open_rows = [list(p) for p in prompts], set(range(len(prompts)))
    for _ in range(tokens):
        logits_BV = step(new, [len(text) - len(row) for text, row in zip(texts, new, strict=True)])
        with paused():
            drawn = torch.zeros(len(prompts))
            if logits_BV is not None:
                drawn = draw_tokens(logits_BV, sampling, generator)
            drawn = pipe.sum(drawn.to(device)).tolist()  # from the last stage to all ranks
        if min(drawn) < 0:
            raise UserError(
                "the model's logits are not finite, so its weights are damaged or the run has "
                "diverged; use an earlier checkpoint"
            )
        new = [[int(token)] for token in drawn]
        for row in list(open_rows):
            texts[row] += new[row]
            if new[row][0] in ends:
                open_rows.remove(row)
        for row in set(range(len(prompts))) - open_rows:
            new[row] = texts[row][-1:]  # a row that has ended repeats its last token in its slot
        if not open_rows:
            break
    return texts


class Decoder:
    """The model with the caches of ``rows`` texts of up to ``slots`` tokens each."""

    def __init__(
        self,
        params: tuple[Transformer, ...],
        rows: int,
        slots: int,
        m: ModelConfig,
        pipe: Pipeline,
        device: str,
    ):
        layout = _by_rows(pipe.layout)
        unit = layout.parts("tokens_sp")
        self._rows, self._filled = rows, -(-rows // unit) * unit
        self._m, self._pipe, self._layout, self._device = m, pipe, layout, device
        weights = unshard(params, layout)
        dtype = flat(weights[0].blocks)[0].dtype

        def empty(p: Block) -> Any:
            return m.mixer(p.letter).empty_cache(self._filled, slots, layout, dtype, device)

        self._weights = [(p, tuple(map(empty, p.blocks))) for p in weights]

    def __call__(self, new: Sequence[Sequence[int]], starts: Sequence[int]) -> Tensor | None:
        """Run new tokens of each row and return the logits after them, ``[rows, vocab]``. Returns
        None on ranks without the last stage.

        ``new``: the new tokens of each row.
        ``starts``: the position of each row's first new token."""
        longest, fill = max(map(len, new)), self._filled - self._rows
        # Padded to one more token than the longest row: a batch has a target for its last token.
        padded = [[*row, *[0] * (longest - len(row) + 1)] for row in [*new, *[[0]] * fill]]
        tokens = torch.tensor(padded)
        first = torch.tensor([*starts, *[0] * fill])
        places = first[:, None] + torch.arange(longest)
        last = torch.tensor([len(row) - 1 for row in new] + [0] * fill)
        layout = self._layout
        tokens, places, last = (x.to(self._device) for x in (tokens, places, last))
        batch = make_batch(tokens, layout, positions_BS=places)
        functions = _functions(self._m, layout, layout.shard(last, "tokens"))
        logits = evaluate(functions, self._weights, [batch], self._pipe)
        return None if logits is None else full(logits)[: self._rows].float().cpu()


def _functions(m: ModelConfig, layout: Layout, last_B: Tensor) -> Program:
    """Return the model's functions for stages whose params are pairs of weights and caches."""

    def enter(p: tuple[Transformer, tuple[Any, ...]], batch: Any) -> Tensor:
        return embed(p[0], batch, m, layout)

    def run(
        p: tuple[Transformer, tuple[Any, ...]], x_TD: Tensor, batch: Any
    ) -> tuple[Tensor, None]:
        return stage_logits(p[0], x_TD, batch, m, layout, p[1], last_B)

    return Program(enter, run)


def _by_rows(layout: Layout) -> Layout:
    """Return a layout in which cp shards rows, like dp, and no sequences. It is for programs
    without sequences to shard: in generation, a row's next token is a single token. The placements
    of weights do not change."""
    return replace(layout, rules={**layout.rules, "rows": layout.rules["tokens"], "sequence": ()})


def draw_tokens(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw one token for each row; -1 if the logits are not finite."""
    if not logits_BV.amax(-1).isfinite().all():  # a word of the padding has -inf
        return torch.full((len(logits_BV),), -1)
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    # The largest logit becomes 0, so a tiny temperature makes the others -inf and not all of them
    # inf. In float64 neither a tiny temperature nor a tiny top_p rounds to 0.
    shifted_BV = logits_BV.double() - logits_BV.double().amax(-1, keepdim=True)
    probabilities = (shifted_BV / sampling.temperature).softmax(-1)
    sorted_BV, order_BV = probabilities.sort(dim=-1, descending=True)
    # The probability of the more likely tokens. It is 0 for the most likely token, which is
    # therefore never masked.
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    sorted_BV = sorted_BV.masked_fill(before_BV >= sampling.top_p, 0.0)
    return order_BV.gather(1, torch.multinomial(sorted_BV, 1, generator=generator))[:, 0]


def check_prompts(prompts: Sequence[Sequence[int]], tokens: int, m: ModelConfig) -> int:
    """Return the length of the longest prompt. Raises UserError for a prompt that cannot be
    continued by ``tokens`` tokens."""
    if not prompts or not all(prompts):
        raise UserError("--prompt: a prompt has no tokens; give at least one word")
    largest = max(map(max, prompts))
    if largest >= m.vocab:
        raise UserError(
            f"--prompt: has token {largest}, the model {m.vocab} of them; give the model's own "
            "tokenizer"
        )
    longest = max(map(len, prompts))
    if longest + tokens > m.context:
        raise UserError(
            f"--tokens {tokens} after a prompt of {longest}: the model's context is {m.context}; "
            + (
                f"use --tokens {m.context - longest}"
                if longest < m.context
                else "use a shorter prompt"
            )
        )
    return longest


def sample(params: Any, data: Data, config: RunConfig, plan: RunPlan, pipe: Pipeline) -> str:
    """Return the first tokens of the held-out text, continued by the model for
    ``config.sample_tokens`` tokens."""
    prompt = data.validation.rows(0, 1).tokens[0, :8].tolist()
    if config.simulate:  # this process has every rank's weights, and one device is faster
        layout = Layout(compute=pipe.layout.compute)
        params, pipe = (pipe.whole(params),), one_stage(config.model, 1, layout)
    tokens = min(config.sample_tokens, config.model.context - len(prompt))
    sampling = Sampling(seed=config.seed)
    (ids,) = generate(params, [prompt], tokens, config.model, pipe, sampling, plan.device)
    return data.decode(ids)
