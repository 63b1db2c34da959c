"""The engine: requests in, tokens out, with continuous batching.

The caches are updated in place, so the engine is an object and not a value. scheduler.py decides
which tokens a step runs; cached_model.py runs them; sampling.py draws the next ones.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dtron.distributed.simulated_ranks import paused
from dtron.errors import UserError
from dtron.generation.cached_model import CachedModel
from dtron.generation.forward_inputs import ForwardInputs, decode_inputs, prefill_inputs
from dtron.generation.recorded_forward import RecordedForward, can_record
from dtron.generation.sampling import Sampling, draw_tokens
from dtron.generation.scheduler import CacheSize, Piece, Request, Scheduler
from dtron.mesh import by_rows
from dtron.model.config import ModelConfig
from dtron.model.transformer import Transformer
from dtron.training.pipeline import Pipeline


@dataclass(frozen=True)
class TokenEvent:
    """A new token of a request.

    ``finished``: "stop" after an end token, "length" after the last token that was asked for, None
        if the text goes on."""

    number: int
    token: int
    finished: Literal["stop", "length"] | None


class Engine:
    """Generates the texts of requests, on any mesh.

    ``params``: the weights of this process's stages.
    ``size``: the size of the cache. ``rows`` is rounded up to a multiple of the ranks that share
        tokens.
    ``cuda_graph``: whether decodes are recorded as CUDA graphs; see recorded_forward.py.
    ``compile``: whether decodes are compiled, see cached_model.py. The first one takes seconds.

    All ranks must call the same methods with the same arguments."""

    def __init__(
        self,
        params: tuple[Transformer, ...],
        m: ModelConfig,
        pipe: Pipeline,
        size: CacheSize,
        device: str = "cpu",
        cuda_graph: bool = False,
        compile: bool = False,
    ):
        layout = by_rows(pipe.layout)
        unit, pools = layout.parts("tokens_sp"), layout.parts("tokens")
        size = replace(size, rows=-(-size.rows // unit) * unit)
        self._m, self._pipe, self._device, self._tp = m, pipe, device, unit // pools
        if cuda_graph and not can_record(m, pipe, compile):
            raise UserError(
                f"cuda_graph with {len(pipe.table.rows)} stages and {m.moe.experts} experts: "
                "decodes of pipelines are not recorded, and experts only where they are compiled; "
                "leave it out"
            )
        model = CachedModel(params, m, pipe, size, device, "inductor" if compile else None)
        # Block tables of one width are one kind of decode, which is compiled once.
        self._width = min(size.pages_for(m.context), size.pages - 1) if compile else None
        self._forward = RecordedForward(model) if cuda_graph else model
        self._scheduler, self._count = Scheduler(size, pools), 0

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._scheduler.waiting or self._scheduler.running)

    def add(
        self,
        prompt: Sequence[int],
        tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
        ends: Set[int] = frozenset(),
    ) -> int:
        """Add a request, and return its number. Raises UserError for a prompt that is empty or that
        leaves no room in the model's context or in the cache.

        ``tokens``: the largest number of new tokens.
        ``ends``: tokens that end the text. The end token is the last one."""
        check_prompts([prompt], tokens, self._m)
        generator = torch.Generator().manual_seed(sampling.seed)
        text, number = list(prompt), self._count
        request = Request(number, text, len(text), tokens, sampling, frozenset(ends), generator)
        self._scheduler.add(request)
        self._count += 1
        return number

    def cancel(self, number: int) -> None:
        """Remove a request. Nothing happens if it has ended."""
        for request in [*self._scheduler.waiting, *self._scheduler.running]:
            if request.number == number:
                self._scheduler.remove(request)

    def step(self) -> list[TokenEvent]:
        """Run a step: a chunk of texts that are read, and the next token of the others. Return the
        new tokens. Raises UserError for logits that are not finite."""
        prefill, decode = self._scheduler.plan()
        drawn: list[Tensor] = []
        pieces: list[Piece] = []
        if prefill:
            inputs, rows = prefill_inputs(self._scheduler, prefill, self._tp)
            ready = [(p, row) for p, row in zip(prefill, rows, strict=True) if p.complete]
            pieces += [p for p, _ in ready]
            drawn.append(self._run(inputs, [p for p, _ in ready], [row for _, row in ready]))
        if decode:
            inputs = decode_inputs(self._scheduler, decode, self._width)
            pieces += decode
            drawn.append(self._run(inputs, decode, [p.request.row or 0 for p in decode]))
        for piece in [*prefill, *decode]:
            self._scheduler.commit(piece)
        if not pieces:
            return []
        with paused():
            tokens = self._pipe.sum(torch.cat(drawn))  # from the last stage to all ranks
            return self._take(pieces, [int(token) for token in tokens.tolist()])

    def _run(self, x: ForwardInputs, pieces: list[Piece], rows: list[int]) -> Tensor:
        """Run a forward, and draw the next tokens of some rows. Return zeros on ranks without the
        last stage."""
        logits_BV = self._forward(x.to(self._device))
        with paused():
            if logits_BV is None or not rows:
                return torch.zeros(len(rows), dtype=torch.long, device=self._device)
            requests = [piece.request for piece in pieces]
            uniform = [_random_number(request) for request in requests]
            index = torch.tensor(rows, device=self._device)
            return draw_tokens(
                logits_BV[index],
                [r.sampling for r in requests],
                torch.tensor(uniform, dtype=torch.float64, device=self._device),
                [r.text for r in requests],
            )

    def _take(self, pieces: list[Piece], tokens: list[int]) -> list[TokenEvent]:
        """Append the new tokens to their texts. Remove the texts that have ended."""
        if min(tokens) < 0:
            raise UserError(
                "the model's logits are not finite, so its weights are damaged or the run has "
                "diverged; use an earlier checkpoint"
            )
        events = []
        for piece, token in zip(pieces, tokens, strict=True):
            request = piece.request
            request.text.append(token)
            events.append(TokenEvent(request.number, token, request.finished))
            if request.finished:
                self._scheduler.remove(request)
        return events


def _random_number(request: Request) -> float:
    """Draw the number that decides the next token, if it depends on one."""
    if request.sampling.temperature == 0:
        return 0.0
    return torch.rand((), dtype=torch.float64, generator=request.generator).item()


def check_prompts(prompts: Sequence[Sequence[int]], tokens: int, m: ModelConfig) -> int:
    """Return the length of the longest prompt. Raises UserError for a prompt that cannot be
    continued by ``tokens`` tokens."""
    if not prompts or not all(prompts):
        raise UserError("--prompt: a prompt has no tokens; give at least one word")
    if tokens < 1:
        raise UserError(f"--tokens {tokens}: at least 1 is generated; raise it")
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
