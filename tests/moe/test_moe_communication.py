"""The collectives of dispatchers, and what makes the host wait for the device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from dtron.moe.config import MoEConfig
from dtron.moe.experts import Experts
from dtron.moe.layer import MoELayer, moe
from dtron.moe.router import Router, TokenInfo
from dtron.testing import (
    LayerCase,
    run_layer,
)
from dtron.tools.count_collectives import Collective
from tests.helpers.experts import F64, ONE, T, config, dims, layer


def test_all_to_alls_of_tokens_and_nothing_else_on_ep():
    """Forward has two all-to-alls of tokens and one of counts, backward two of tokens. The router's
    own gradient is reduced at the end."""
    c, mesh, k = config("dp=2,ep=2"), "dp=2,ep=2", 2
    got = run_layer(LayerCase(layer(c, "alltoall"), MoELayer, dims(c), tokens=T, zero=0), mesh)
    assert got.forward.count == {Collective("all_to_all", "dp.ep"): 3}
    assert got.total.count == {
        Collective("all_to_all", "dp.ep"): 5,
        Collective("all_reduce", "dp.ep"): 1,  # gradients of the router, end to end
    }
    tokens = T // 2 * k * 10 * 8  # bytes of a rank's rows
    counts = c.experts * 8
    assert got.forward.bytes[Collective("all_to_all", "dp.ep")] <= 2 * 2 * tokens + counts


@pytest.mark.parametrize(
    ("dispatch", "forward", "total"),
    [
        ("static", {"all_to_all": 2}, {"all_to_all": 4}),
        (
            "allgather",
            {"all_gather": 3, "reduce_scatter": 1},
            {"all_gather": 4, "reduce_scatter": 3},
        ),
    ],
)
def test_what_the_other_dispatchers_communicate(dispatch, forward, total):
    c, mesh = config("dp=2,tp=2,ep=4"), "dp=2,tp=2,ep=4"
    got = run_layer(LayerCase(layer(c, dispatch), MoELayer, dims(c), tokens=T, zero=0), mesh)
    on_ep = lambda counter: {k.kind: n for k, n in counter.count.items() if k.axis == "ep"}
    assert on_ep(got.forward) == forward
    found = on_ep(got.total)
    found.pop("all_reduce")  # of the router's gradient
    assert found == total


class Waits(TorchFunctionMode):
    """Count what makes the host wait for the device: a number that is read, or a shape that depends
    on values."""

    NAMES = (
        "tolist",
        "item",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "nonzero",
        "unique",
        "numpy",
    )

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        by_counts = name == "repeat_interleave" and "output_size" not in (kwargs or {})
        self.count += name in self.NAMES or by_counts
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("capacity", [0.0, 1.0])
def test_the_static_path_never_waits_for_the_device(capacity):
    plain = MoEConfig(8, 2, 16, router_bias=True, aux_loss=0.1, z_loss=0.1)
    g = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(shape, generator=g, dtype=F64).requires_grad_()
    p = MoELayer(
        Router(make(10, 8), make(8), None),
        Experts(make(8, 10, 16), make(8, 10, 16), make(8, 16, 10), None, None, None),
        None,
        None,
    )
    seen = TokenInfo(torch.ones(T, dtype=torch.bool), torch.zeros(T, dtype=torch.long), 1)
    waited = {}
    for dispatch, c in (("static", replace(plain, capacity_factor=capacity)), ("auto", plain)):
        with Waits() as waits:
            y, aux, _ = moe(p, make(T, 10), seen, c, ONE, dispatch=dispatch)
            torch.autograd.grad(y.sum() + aux, [p.experts.w_up, p.router.w])
        waited[dispatch] = waits.count
    assert waited["static"] == 0 < waited["auto"]  # a loop over experts reads its counts
