"""A decode can be recorded as a CUDA graph: the host reads no number of it, and makes no tensor of
numbers. Without a GPU, a stand-in of CUDA graphs records and replays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dtron.generation.cached_model import CachedModel
from dtron.generation.engine import Engine
from dtron.generation.forward_inputs import ForwardInputs, decode_inputs
from dtron.generation.sampling import Sampling
from dtron.generation.scheduler import CacheSize, Request, Scheduler
from dtron.testing import assert_caught
from dtron.training.pipeline import one_stage
from dtron.tree import flat
from tests.generation.models import MODELS, weights
from tests.generation.test_engine import SMALL, STREAM, run
from tests.helpers.values import ONE
from tests.training.test_cuda_graph import Graph, capture

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim"}
COPIES = {"lift_fresh"}  # a tensor of Python's numbers


class Watch(TorchDispatchMode):
    """Refuses operators that a recording cannot have."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in WAITS | COPIES, f"{name} is called"
        masks = [x for x in flat(args[1:2]) if isinstance(x, Tensor) and x.dtype == torch.bool]
        assert not (name.startswith("index") and masks), "a mask selects a number of elements"
        return func(*args, **(kwargs or {}))


def decode(name: str) -> tuple[CachedModel, ForwardInputs]:
    m = MODELS[name]
    scheduler = Scheduler(CacheSize(rows=2, pages=8, page=4), 1)
    model = CachedModel(weights(m), m, one_stage(m, 1, ONE), scheduler.size, "cpu")
    request = Request(0, [5, 9, 2], 3, 4, Sampling(), frozenset(), torch.Generator())
    scheduler.add(request)
    (piece,), _ = scheduler.plan()
    request.cached = 2
    return model, decode_inputs(scheduler, [replace(piece, count=1)])


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"experts"}))
def test_the_host_reads_nothing(name):
    model, inputs = decode(name)
    with Watch():
        model(inputs)


def test_a_number_that_is_read_is_noticed():
    model, inputs = decode("grouped")
    for wrong in (lambda x: x.sum().item(), lambda x: x[x > 1], lambda x: x * torch.tensor([1])):

        def check(wrong=wrong) -> None:
            with Watch():
                model(inputs)
                wrong(inputs.table_BP)

        assert_caught(check)


def engine_of(name: str, cuda_graph: bool) -> Engine:
    m = MODELS[name]
    return Engine(weights(m), m, one_stage(m, 1, ONE), SMALL, "cpu", cuda_graph)


def recorded(name: str, monkeypatch) -> list[list[int]]:
    """The texts of recorded decodes, which the stand-in of a graph replays."""
    monkeypatch.setattr(Graph, "alive", [], raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: capture(graph, "global"))
    engine = engine_of(name, cuda_graph=True)
    caches = [x for x in flat(engine._forward._model._caches) if isinstance(x, Tensor)]
    monkeypatch.setattr(Graph, "untouched", caches, raising=False)
    found = run(engine, STREAM)
    assert sum(graph.replays for graph in Graph.alive) > len(Graph.alive) > 0
    return found


@pytest.mark.parametrize("name", ["window", "latent", "mamba"])
def test_recorded_decodes_change_no_text(name, monkeypatch):
    assert recorded(name, monkeypatch) == run(engine_of(name, cuda_graph=False), STREAM)


def test_inputs_that_are_not_copied_are_caught(monkeypatch):
    monkeypatch.setattr("dtron.generation.recorded_forward.zip", lambda *a, **k: [], raising=False)
    assert_caught(lambda: test_recorded_decodes_change_no_text("window", monkeypatch))
