"""The runner of a pipeline: the activations that it keeps, and the matmuls of a split backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.stages import layers_per_stage, split_into_stages
from dtron.model.transformer import declare_model
from dtron.params import init
from dtron.schedules import SCHEDULES, make, peaks
from dtron.schedules.p2p import InProcessLinks
from dtron.schedules.runner import Program, run
from dtron.schedules.split_backward import backward, backward_input
from dtron.training.pipeline import Pipeline, program
from dtron.tree import flat, tree_map
from tests.helpers.runs import MODEL


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("pp", "count"), [(2, 7), (4, 9)])
def test_no_more_activations_alive_than_the_table_says(schedule, pp, count):
    """Autograd counts: what a microbatch saves in a stage is alive from its F to its B or W."""
    t = make(schedule, pp, count)
    m = replace(MODEL, layers=t.stages, tied=False)
    layers = layers_per_stage(m, t.stages, 16)
    pipe = Pipeline(t, tuple(split_into_stages(m, layers)), Layout())
    weights = tree_map(
        lambda w: w.detach().requires_grad_(), init(pipe.spec, m.dims(), 0, Layout())
    )
    by_stage = dict(zip(pipe.stages, weights, strict=True))
    batch = make_batch(torch.zeros(1, 17, dtype=torch.long), Layout())
    functions = program(m, Layout())
    alive, most = dict.fromkeys(range(pp), 0), dict.fromkeys(range(pp), 0)

    class Tracked(torch.autograd.Function):
        """Save a tensor that counts itself out when autograd drops it."""

        @staticmethod
        def forward(ctx, x, stage):
            ctx.token = Token(t.rank_of[stage])
            return x * 1

        @staticmethod
        def backward(ctx, g):
            return g, None

    class Token:
        def __init__(self, rank):
            self.rank = rank
            alive[rank] += 1
            most[rank] = max(most[rank], alive[rank])

        def __del__(self):
            alive[self.rank] -= 1

    number = {id(tree): s for s, tree in by_stage.items()}
    stage = lambda p, x, b: functions.stage(p, Tracked.apply(x, number[id(p)]), b)
    out = run(
        t,
        pipe.ranks,
        Program(functions.enter, stage),
        by_stage,
        {s: flat(w) for s, w in by_stage.items()},
        [batch] * count,
        InProcessLinks(),
        lambda *args: None,
    )
    assert list(out.peak.values()) == peaks(t)
    assert list(most.values()) == peaks(t) and set(alive.values()) == {0}


class Products(TorchDispatchMode):
    """Count matmuls."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("mm", "bmm", "addmm")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tied", [False, True])
def test_a_backward_in_halves_computes_nothing_twice(tied):
    """The gradients are equal to the bit, and each half has half of the matmuls."""
    m = replace(MODEL, layers=2, bias=True, qkv_bias=True, tied=tied)
    (weights,) = init((declare_model(m),), m.dims(), 0, Layout(), torch.float64)
    weights = tree_map(lambda w: w.detach().requires_grad_(), weights)
    batch = make_batch(torch.arange(34).view(2, 17), Layout())
    functions = program(m, Layout())
    one = torch.ones((), dtype=torch.float64)

    def forward():
        x = functions.enter(weights, batch).detach().requires_grad_()
        return x, [get_gradient_edge(functions.stage(weights, x, batch)[0])]

    x, y = forward()
    with Products() as whole:
        want, hand_over = backward(y, x, flat(weights), [one])
    x, y = forward()
    with Products() as first:
        got, later = backward_input(y, x, flat(weights), [one])
    with Products() as second:
        grads = later()
    assert torch.equal(got, want)
    for a, b in zip(hand_over(), grads, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
    linear = (
        2 * 7
    )  # two blocks of q, k, v, o, gate, up and down; matmuls inside attention do not count
    assert second.count == linear and first.count + second.count == whole.count
