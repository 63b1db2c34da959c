"""A recorded step, without a GPU: its launch, and one recording for each size of a batch ramp."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dtron.distributed.mesh_shape import MeshShape
from dtron.mesh import Layout
from dtron.model.batch import make_batch, valid_tokens
from dtron.params import init
from dtron.runtime.config import DataConfig, RunConfig
from dtron.training.cuda_graph import CudaGraphStep, finishes
from dtron.training.elementwise_optimizer import update_weight
from dtron.training.optimizer import init_state
from dtron.training.pipeline import pipeline, program
from dtron.training.step import TrainStep
from dtron.tree import flat
from tests.helpers.runs import MODEL, random_rows
from tests.helpers.values import ADAMW, F64

CONFIG = RunConfig(model=MODEL, data=DataConfig(seq_len=16), seed=3)


def test_a_launch_that_returns_not_in_time_is_noticed():
    released = threading.Event()
    assert not finishes(released.wait, 0.01)
    released.set()
    assert finishes(released.wait, 60.0)


def test_an_error_of_a_launch_is_raised():
    def fails() -> None:
        raise RuntimeError("CUDA error")

    with pytest.raises(RuntimeError, match="CUDA error"):
        finishes(fails, 60.0)


# ---- one recording for each size


class Graph:
    """A CUDA graph of a CPU: the operations that were called, with their tensors.

    ``alive``: the graphs that were not reset.
    ``untouched``: tensors that a recording must not change: it only records."""

    alive: ClassVar[list[Graph]]
    untouched: ClassVar[list[torch.Tensor]]

    def __init__(self):
        self.calls, self.replays = [], 0
        self.alive.append(self)

    def reset(self):
        self.alive.remove(self)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for op, args, named, outputs in self.calls:
            for old, new in zip(flat((outputs,)), flat((op(*args, **named),)), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)


class Recorder(TorchDispatchMode):
    def __init__(self, graph: Graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        outputs = op(*args, **(kwargs or {}))
        self.graph.calls.append((op, args, kwargs or {}, outputs))
        return outputs


@contextmanager
def capture(graph: Graph, capture_error_mode: str):
    before = [x.clone() for x in graph.untouched]
    with Recorder(graph):
        yield
    for x, old in zip(graph.untouched, before, strict=True):
        x.copy_(old)


@pytest.fixture
def graphs(monkeypatch):
    """Stand-ins of CUDA graphs; the fixture is the graphs that are alive."""
    monkeypatch.setattr(Graph, "alive", [], raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return Graph.alive


COUNTS = (1, 1, 1, 1, 2, 2, 2, 2, 2, 3)


def alive() -> tuple[int, int]:
    """The number of graphs, and of their replays."""
    return len(Graph.alive), sum(graph.replays for graph in Graph.alive)


def recorded(record: bool, decay: bool = False, step_of=CudaGraphStep) -> list[tuple[float, ...]]:
    """Losses and norms of a run whose steps have ``COUNTS`` microbatches, and for each step the
    numbers of graphs that are alive and of their replays."""
    pipe = pipeline(CONFIG, MeshShape(), 1, 16, Layout(), COUNTS)
    step = TrainStep(program(MODEL, Layout()), pipe, CONFIG, replace(ADAMW, kernel=update_weight))
    params = init(pipe.spec, MODEL.dims(), 0, Layout(), F64)
    opt, found = init_state(step.optimizer, pipe.spec, params), []
    Graph.untouched = flat((params, *opt.trees.values()))
    step = step_of(step, "cpu", plain=2) if record else step
    for number, count in enumerate(COUNTS):
        rows = random_rows(replace(CONFIG, batch=2 * count), number)
        batches = [make_batch(r, Layout()) for r in rows.split(2)]
        loss, norm, _, params, opt = step(
            params,
            opt,
            batches,
            valid_tokens(rows),
            1e-2 / (1 + number),
            decay=20.0 / (1 + number) if decay else None,
        )
        found.append((loss.item(), norm.item(), *(alive() if record else ())))
    return found


@pytest.mark.parametrize("decay", [False, True])
def test_each_size_has_one_recording(graphs, decay):
    """The recorded steps are the steps that run. The recording of an earlier size is gone."""
    found = recorded(True, decay)
    plain = recorded(False, decay)
    assert [x[:2] for x in found] == [pytest.approx(x[:2], rel=1e-12) for x in plain]
    assert [x[2:] for x in found] == [
        *[(0, 0), (0, 0), (1, 1), (1, 2)],
        *[(0, 0), (0, 0), (1, 1), (1, 2), (1, 3)],
        (0, 0),
    ]
    if decay:
        assert [x[0] for x in plain] != [x[0] for x in recorded(False)]


def test_a_recording_with_a_fixed_decay_is_seen(graphs):
    """The mutant: the decay of the recording is not read from the device."""

    class Fixed(CudaGraphStep):
        def _run(self, params, opt, microbatches, numbers):
            return self._step(params, opt, microbatches, *numbers[:3].unbind(), numbers[3].item())

    plain = recorded(False, True)
    found = recorded(True, True, Fixed)
    assert [x[0] for x in found] != [pytest.approx(x[0], rel=1e-9) for x in plain]


def test_other_shapes_of_the_same_number_run_unrecorded(graphs):
    """They keep the recording: such a step is of no other size of the ramp."""
    pipe = pipeline(CONFIG, MeshShape(), 1, 16, Layout())
    step = TrainStep(program(MODEL, Layout()), pipe, CONFIG, replace(ADAMW, kernel=update_weight))
    step = CudaGraphStep(step, "cpu", plain=1)
    params = init(pipe.spec, MODEL.dims(), 0, Layout(), F64)
    opt, replays = init_state(ADAMW, pipe.spec, params), []
    Graph.untouched = flat((params, *opt.trees.values()))
    for size in (2, 2, 4, 2):
        rows = random_rows(replace(CONFIG, batch=size), 0)
        opt = step(params, opt, [make_batch(rows, Layout())], valid_tokens(rows), 1e-2)[-1]
        replays.append([g.replays for g in graphs])
    assert replays == [[], [1], [1], [2]]
