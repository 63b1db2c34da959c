"""Traced functions: one graph for each kind of call, and graphs that torch keeps on disk."""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from dtron.layers.recompute import checkpointed
from dtron.torch_compile import tracing
from dtron.training.traced_function import GraphCompiler, TracedFunction
from tests.helpers.compiled import lone_rank

EAGER = GraphCompiler("aot_eager")


def scaled(tensors, factor, more=None):
    (x,) = tensors
    return [x * factor], {"traced": tracing()}


def test_a_kind_is_traced_once():
    """Plain values, shapes, dtypes, strides, and whether gradients are needed make a kind."""
    fn, x = TracedFunction(scaled, EAGER), torch.ones(2, 3)
    for factor, given in [(2, x), (2, x + 1), (3, x), (2, x.double()), (2, torch.ones(3, 2).t())]:
        (y,) = fn([given], factor)
        assert torch.equal(y, given * factor)
    assert len(fn.kinds) == 4
    y = fn([x.clone().requires_grad_()], 2)[0]
    y.sum().backward()
    with torch.no_grad():
        fn([x], 2)
    assert len(fn.kinds) == 6
    assert all(kind.extra == {"traced": True} for kind in fn.kinds.values()) and not tracing()


class Forgetful:
    """A compiler whose results keep nothing of their graph."""

    def compile(self, graph, inputs, key, weights):
        return lambda *xs: xs


def test_objects_without_a_text_are_told_apart_while_they_live():
    fn, x = TracedFunction(scaled, Forgetful()), torch.ones(2)
    for _ in range(3):
        gc.collect()  # a freed object's address would be used again
        fn([x], 2, object())
    assert len(fn.kinds) == 3
    same = object()
    fn([x], 2, same)
    fn([x], 2, same)
    assert len(fn.kinds) == 4


def product(tensors, power):
    x, w = tensors
    y = checkpointed(lambda x: x @ w, x)
    for _ in range(power):
        y = y @ w
    return [y], power


@pytest.mark.parametrize("mesh", [None, "dp=2,tp=2"])
def test_torch_keeps_the_graphs(monkeypatch, tmp_path, mesh):
    """A second function finds both graphs of the first: the second start of a program does. Another
    plain value, or a shape, does not find them."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    context = () if mesh is None else (lone_rank(mesh),)
    start = partial(TracedFunction, product, GraphCompiler(), *context)

    def found(fn, power: int, size: int = 4) -> tuple[int, int]:
        counters["aot_autograd"].clear()
        x, w = torch.randn(size, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
        kind = fn.kind([x, w], power)
        assert kind.extra == power
        want = product([x, w], power)[0][0]
        (got,) = kind.run(x, w)
        for a, b in zip(*(torch.autograd.grad(y.sum(), (x, w)) for y in (got, want)), strict=True):
            torch.testing.assert_close(a, b)
        seen = counters["aot_autograd"]
        return seen["autograd_cache_hit"], seen["autograd_cache_miss"]

    assert found(start(), 1) == (0, 1)
    assert found(start(), 1) == (1, 0)
    assert found(start(), 2) == (0, 1)
    assert found(start(), 1, size=3) == (0, 1)
