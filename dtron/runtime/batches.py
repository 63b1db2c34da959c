"""The global batches of a run, as microbatches on this rank's device.

A thread reads the next batches while the device works (data/prefetch.py). With a GPU it copies the
batches into pinned memory, from which the GPU copies without the host. A batch is a pure function
of the number of its first sample. So a resumed run continues with the same batch as an
uninterrupted run.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from dtron.data import Data, Prefetch, Rows
from dtron.losses.sequence_sums import count_pairs
from dtron.mesh import Layout
from dtron.model.batch import Batch, make_batch
from dtron.runtime.config import RunConfig
from dtron.training.config import RunPlan


class HostBatch(NamedTuple):
    """A global batch in host memory.

    ``columns``: tokens, documents, positions, counted targets, as in ``Rows``; None if not used.
    ``valid``: the number of targets in the loss.
    ``terms``: the number of terms of the loss: targets, or pairs."""

    columns: tuple[Tensor | None, ...]
    valid: int
    terms: int


class GlobalBatch(NamedTuple):
    """A global batch on the device.

    ``valid``: the number of targets in the loss, over all ranks.
    ``terms``: the number of terms of the loss, over all ranks: targets, or pairs.
    ``size``: the number of samples.
    ``wait_seconds``: the time that this rank's host waited for the data.
    ``ready``: when the batch was ready, in seconds of ``time.perf_counter``."""

    microbatches: list[Batch]
    valid: int
    terms: int
    size: int
    wait_seconds: float
    ready: float

    @property
    def inputs(self) -> tuple[list[Batch], int]:
        """The arguments of a training step."""
        return self.microbatches, self.terms


class Batches:
    """The global batches of training: ``next()`` for each step.

    ``step``, ``samples``: the steps that are done, and the samples that they have used. A run that
        goes on may have another batch size than before, so neither gives the other."""

    def __init__(
        self, config: RunConfig, plan: RunPlan, layout: Layout, data: Data, step: int, samples: int
    ):
        def read(part: range) -> HostBatch:
            return to_host(data.train.rows(part.start, len(part)), config, plan)

        self._config, self._plan, self._layout = config, plan, layout
        phases = config.ramp.phases(config.steps, step, samples)
        parts = (
            range(start, start + size)
            for steps, first, size in phases
            for start in range(first, first + steps * size, size)
        )
        self._prefetch = Prefetch(read, parts)

    def next(self) -> GlobalBatch:
        batch = self._prefetch.next()
        microbatches = split(batch, self._config, self._plan, self._layout)
        tokens = batch.columns[0]
        assert tokens is not None  # ``Rows`` always has tokens
        size, waited = len(tokens), self._prefetch.waited
        ready = time.perf_counter()
        return GlobalBatch(microbatches, batch.valid, batch.terms, size, waited, ready)


def to_host(rows: Rows, config: RunConfig, plan: RunPlan) -> HostBatch:
    """Convert rows to tensors, in pinned memory if the device is a GPU. Any thread may call this
    function."""
    gpu = plan.device.startswith("cuda")
    if gpu:
        torch.cuda.set_device(plan.device)  # pinned memory belongs to the thread's device
    if config.data.masked and not config.data.learn_next_document:
        rows = rows.within_documents()
    documents = rows.documents if config.data.masked else None
    positions = rows.positions if config.data.restarts else None
    columns = (rows.tokens, documents, positions, rows.counted)
    tensors = [None if x is None else torch.from_numpy(x) for x in columns]
    terms = rows.valid
    if config.loss.objective.sequences:
        _, document, _, counted = tensors
        assert document is not None and counted is not None  # rows of pairs have both
        terms = count_pairs(document, counted)
    pinned = tuple(x.pin_memory() if gpu and x is not None else x for x in tensors)
    return HostBatch(pinned, rows.valid, terms)


def split(batch: HostBatch, config: RunConfig, plan: RunPlan, layout: Layout) -> list[Batch]:
    """Split a global batch into microbatches. Every rank passes the whole batch and keeps its own
    shard."""
    tokens, *others = batch.columns
    assert tokens is not None  # ``Rows`` always has tokens

    def on_device(column: Tensor) -> tuple[Tensor, ...]:
        return column.to(plan.device, non_blocking=True).split(plan.rows)

    rows = on_device(tokens)
    absent = (None,) * len(rows)
    documents, positions, counted = (absent if x is None else on_device(x) for x in others)
    parts = zip(rows, documents, positions, counted, strict=True)
    depth, zigzag = config.model.mtp.depth, config.zigzags
    limited = config.model.moe.capacity_factor > 0
    sequences = config.loss.objective.sequences
    return [
        make_batch(one, layout, d, p, c, depth, zigzag, limited, sequences)
        for one, d, p, c in parts
    ]
