"""Decodes as CUDA graphs.

A decode of a small batch is hundreds of small kernels. The host launches them more slowly than a
GPU runs them. A CUDA graph is a recording of all launches, which the host launches in one call. The
inputs of a forward are copied into the buffers that the recorded kernels read. forward_inputs.py
keeps the number of kinds of shapes small: each kind has a recording. Prefill is not recorded: its
kernels are large, and its shapes have more kinds.

Not for pipelines, whose messages are sent by the host. Experts must be compiled: otherwise the host
launches their kernels by numbers of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dtron.generation.cached_model import CachedModel
from dtron.generation.forward_inputs import ForwardInputs
from dtron.model.config import ModelConfig
from dtron.training.pipeline import Pipeline


@dataclass(frozen=True)
class Recording:
    """A recorded forward.

    ``inputs``: the buffers that it reads.
    ``logits``: the output, which a replay overwrites."""

    graph: torch.cuda.CUDAGraph
    inputs: ForwardInputs
    logits: Tensor


def can_record(m: ModelConfig, pipe: Pipeline, compile: bool) -> bool:
    """Return whether the decodes of a model can be recorded on a GPU.

    ``compile``: whether they are compiled."""
    return len(pipe.table.rows) == 1 and (compile or not m.moe.experts)


class RecordedForward:
    """A forward whose decodes are recorded as CUDA graphs, once for each kind of inputs, and
    replayed.

    ``plain``: the number of first calls of a kind that run unrecorded. In these calls libraries
        start and collectives connect their ranks."""

    def __init__(self, model: CachedModel, plain: int = 2):
        self._model, self._plain = model, plain
        self._calls: dict[Any, int] = {}
        self._recordings: dict[Any, Recording] = {}
        self._pool: Any = None

    def __call__(self, x: ForwardInputs) -> Tensor | None:
        """Run the forward. The next call may overwrite the result: all recordings share their
        memory, because they run one after the other."""
        if x.places_B is not None:  # prefill
            return self._model(x)
        kind = tuple(None if t is None else t.shape for t in x.tensors())
        if kind in self._recordings:
            recording = self._recordings[kind]
            for buffer, new in zip(recording.inputs.tensors(), x.tensors(), strict=True):
                if buffer is not None and new is not None:
                    buffer.copy_(new)
            recording.graph.replay()
            return recording.logits
        calls = self._calls[kind] = self._calls.get(kind, 0) + 1
        if calls <= self._plain:
            return self._model(x)
        graph, logits = torch.cuda.CUDAGraph(), None
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._model(x)
        assert logits is not None  # one stage has the whole model
        self._recordings[kind] = Recording(graph, x, logits)
        graph.replay()
        return logits
