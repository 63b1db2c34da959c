"""Generates the texts of prompts with the same sharded forward that trains.

``dtron.generation`` has the engine. The layers are the layers of training, and the caches of the
mixers are passed beside the weights. So generation runs on any mesh without cp.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace
from typing import Any

from dtron.data import Data
from dtron.generation.engine import Engine, check_prompts
from dtron.generation.sampling import Sampling
from dtron.generation.scheduler import KERNEL_PAGE, CacheSize
from dtron.mesh import Layout, by_rows
from dtron.model.config import ModelConfig
from dtron.model.transformer import Transformer
from dtron.runtime.config import RunConfig
from dtron.training.config import RunPlan
from dtron.training.pipeline import Pipeline, one_stage


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
    ``sampling``: prompt i has the seed ``sampling.seed + i``.
    ``ends``: tokens that end a row. The end token is the row's last."""
    longest = check_prompts(prompts, tokens, m)
    size = cache_for(len(prompts), longest + tokens, pipe)
    engine, texts = Engine(params, m, pipe, size, device), [list(p) for p in prompts]
    for i, prompt in enumerate(prompts):
        engine.add(prompt, tokens, seeded(sampling, i), ends)
    while engine.busy:
        for event in engine.step():
            texts[event.number].append(event.token)
    return texts


def cache_for(rows: int, tokens: int, pipe: Pipeline, compile: bool = False) -> CacheSize:
    """Return a cache in which so many rows of so many tokens have room.

    ``compile``: whether decodes are compiled."""
    size, pools = CacheSize(rows, pages=2), by_rows(pipe.layout).parts("tokens")
    size = replace(size, page=KERNEL_PAGE if compile else size.page)
    return replace(size, pages=1 + -(-rows // pools) * size.pages_for(tokens))


def seeded(sampling: Sampling, number: int) -> Sampling:
    """Return the sampling of the ``number``-th of several texts."""
    return replace(sampling, seed=(sampling.seed + number) % 2**64 if number else sampling.seed)


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
