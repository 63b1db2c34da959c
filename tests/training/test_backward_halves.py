"""The backward of a compiled unit in two graphs: the same gradients, and no matmul twice."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.autograd.graph import get_gradient_edge

from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.mtp import MTPConfig
from dtron.model.stages import split_into_stages
from dtron.moe.config import MoEConfig
from dtron.params import init
from dtron.rules import rules_for
from dtron.schedules import make
from dtron.schedules.p2p import InProcessLinks
from dtron.schedules.runner import run
from dtron.schedules.split_backward import backward, backward_input
from dtron.training import backward_halves
from dtron.training.backward_halves import BackwardHalves, split
from dtron.training.compiled_stage import CompiledStage
from dtron.training.compiled_units import CompiledUnits
from dtron.training.pipeline import Pipeline, program
from dtron.training.traced_function import TracedFunction
from dtron.tree import flat
from tests.helpers.compiled import ROWS, lone_rank
from tests.helpers.runs import MODEL


class Eager:
    """A compiler that leaves a function as it is."""

    def compile(self, graph, inputs, key, weights):
        return graph


class Graphs:
    """A compiler that splits backward graphs, and runs all graphs as they are."""

    def __init__(self, halves: BackwardHalves):
        self.halves = halves

    def compile(self, graph, inputs, key, weights):
        def one_graph(graph, inputs, **how):
            return make_boxed_func(graph.forward)

        compile = self.halves.compiler(one_graph, weights)
        return aot_autograd(
            fw_compiler=compile,
            bw_compiler=partial(compile, is_backward=True),
            partition_fn=min_cut_rematerialization_partition,
        )(graph, inputs)


def unit_of(fn, halves: BackwardHalves):
    """Compile ``fn(x, weights)``."""
    traced = TracedFunction(lambda xs: ([fn(xs[0], xs[1:])], None), Graphs(halves))

    def unit(x, weights):
        xs = [x, *weights]
        return traced.kind(xs, weights=range(1, len(xs))).run(*xs)[0]

    return unit


# ---- one unit


def chain(x, weights):
    """Matmuls with operators between them that need the input, the output, or neither."""
    for i, w in enumerate(weights):
        y = x @ w
        x = (torch.tanh(y), y * y + x, torch.softmax(y, -1))[i % 3]
    return x


def matmuls(graph) -> int:
    return sum(node.target is torch.ops.aten.mm.default for node in graph.graph.nodes)


@settings(max_examples=10)
@given(st.integers(1, 5), st.integers(0, 2**31))
def test_both_halves_are_the_whole(count, seed):
    """Equal to the bit. I has a matmul for each input of a matmul, and W one for each weight."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)
    x, g = draw(6, 4).requires_grad_(), draw(6, 4)
    weights = [draw(4, 4).requires_grad_() for _ in range(count)]
    halves, found = BackwardHalves(), []

    def noted(graph, late):
        found.append((graph, split(graph, late)))
        return found[-1][1]

    patch = pytest.MonkeyPatch()
    patch.setattr(backward_halves, "split", noted)
    try:
        unit = unit_of(chain, halves)
        ends = lambda: [get_gradient_edge(unit(x, weights))]
        want, whole = backward([get_gradient_edge(chain(x, weights))], x, weights, [g])
        got, later = backward_input(ends(), x, weights, [g], halves)
        at_once, made = backward(ends(), x, weights, [g])
    finally:
        patch.undo()
    assert torch.equal(got, want) and torch.equal(at_once, want)
    for a, b, c in zip(whole(), later(), made(), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    ((graph, parts),) = found
    assert matmuls(parts.first) == count == matmuls(parts.second) == matmuls(graph) - count


def test_what_only_the_first_half_reads_is_freed_after_it():
    saved: Counter[str] = Counter()

    def forward(x, weights):
        return torch.tanh(x @ weights[0] * 2).cumsum(0)

    x, w = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    halves = BackwardHalves()
    unit = unit_of(forward, halves)

    class Token:
        def __init__(self):
            saved["alive"] += 1

        def __del__(self):
            saved["alive"] -= 1

    unit(x, [w])  # traced here, so that the hooks see no tensors of the tracer
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (t, Token()), lambda pair: pair[0]):
        y = [get_gradient_edge(unit(x, [w]))]
    assert saved["alive"]
    _, later = backward_input(y, x, [w], [torch.ones(4, 4)], halves)
    y.clear()
    assert not saved["alive"]
    assert later()[0].abs().max() > 0


# ---- a pipeline of compiled stages


def gradients(model, compiles: bool) -> list[torch.Tensor]:
    """The summed gradients of this rank's weights, before they are reduced over ranks."""
    t, count = make("zb-h1", 2, 4), 4
    layout = Layout(lone_rank("dp=2"), rules_for(0))
    each = model.layers // t.stages
    pipe = Pipeline(t, tuple(split_into_stages(model, [each] * t.stages)), layout)
    functions, halves = program(model, layout), BackwardHalves()
    compiler = Graphs(halves) if compiles else Eager()
    stage = CompiledStage(functions, layout, CompiledUnits(layout.mesh, compiler), Eager())
    functions = replace(functions, enter=stage.enter, stage=stage.stage, halves=halves)
    params = init(pipe.spec, model.dims(), 0, layout, torch.float64)
    leaves = [stage.leaves(tree, False, [False] * len(flat(tree))) for tree in params]
    found: dict[tuple[int, int], torch.Tensor] = {}

    def take(number, microbatch, grads):
        for i, g in enumerate(grads):
            if g is not None:
                found[number, i] = found.get((number, i), 0) + g

    run(
        t,
        pipe.ranks,
        functions,
        {s: weights for s, (weights, _) in enumerate(leaves)},
        {s: tensors for s, (_, tensors) in enumerate(leaves)},
        [make_batch(r, layout, depth=model.mtp.depth) for r in ROWS.chunk(count)],
        InProcessLinks(),
        take,
    )
    return [found[key] for key in sorted(found)]


MODELS = {
    "dense": replace(MODEL, layers=2, tied=False),
    "two tokens": replace(MODEL, layers=2, tied=False, mtp=MTPConfig(depth=1)),
    "experts": replace(MODEL, layers=2, moe=MoEConfig(experts=4, top_k=2, mlp=16, aux_loss=0.01)),
}


@pytest.mark.parametrize("model", MODELS)
def test_a_pipeline_of_halves_is_that_of_eager_stages(model):
    want, got = (gradients(MODELS[model], compiles) for compiles in (False, True))
    for a, b in zip(got, want, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_gradient_that_no_half_computes_is_noticed(monkeypatch):
    def forgetful(graph, late):
        parts = split(graph, late)
        if parts is not None:
            (outputs,) = parts.second.graph.output_node().args
            parts.second.graph.output_node().args = ([*outputs[:-2], None, outputs[-1]],)
            parts.second.recompile()
        return parts

    monkeypatch.setattr(backward_halves, "split", forgetful)
    with pytest.raises((AssertionError, ValueError)):
        test_a_pipeline_of_halves_is_that_of_eager_stages("dense")
