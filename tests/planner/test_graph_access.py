"""How a plan reads the kernels of a compiled graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from dtron.planner.graph_cost import GraphCost, read_graph
from dtron.torch_compile import fake_mode


def cost_of(fn: Callable, *shapes: tuple[int, ...]) -> GraphCost:
    with fake_mode(static_shapes=True):
        xs = [torch.empty(shape) for shape in shapes]
        return read_graph(make_fx(fn)(*xs))


ROWS, WIDE = (64, 32), (32, 64)


@pytest.mark.parametrize(
    ("fn", "access"),
    [
        (lambda x: x * 2, "stream"),
        (lambda x: x.permute(1, 0).permute(1, 0) * 2, "stream"),
        (lambda x: x[:, :1].expand(ROWS) * 2, "stream"),
        (lambda x: x * x.sum(-1, keepdim=True), "rows"),
        (lambda x: x.sum(0), "columns"),
        (lambda x: (x * 2).t().contiguous(), "transposed"),
        (lambda x: x[torch.zeros(64, dtype=torch.long)] * 2, "gathered"),
    ],
)
def test_the_access_of_a_kernel(fn, access):
    assert [op.access for op in cost_of(fn, ROWS).operators][-1] == access


def test_a_largest_value_of_all_is_there_after_the_last_element():
    """A cast to 8 bits reads its input twice: for the largest value, and to write."""

    def cast(x: Tensor) -> Tensor:
        return x / x.abs().amax()

    first, second = cost_of(cast, ROWS).operators
    assert first.written == 4 and first.read == 64 * 32 * 4
    assert second.read == 64 * 32 * 4 + 4 and second.written == 64 * 32 * 4
    # The largest value of each row is there after the row.
    (one,) = cost_of(lambda x: x / x.abs().amax(-1, keepdim=True), ROWS).operators
    assert one.read == 64 * 32 * 4


@pytest.mark.parametrize(
    ("fn", "shapes", "layout"),
    [
        (lambda x, w: x @ w, (ROWS, WIDE), "nn"),
        (lambda g, w: g @ w.t(), (ROWS, ROWS), "nt"),
        (lambda x, g: x.t() @ g, (ROWS, ROWS), "tn"),
    ],
)
def test_the_layout_of_a_matmul(fn, shapes, layout):
    (op,) = cost_of(fn, *shapes).operators
    assert (op.kind, op.layout) == ("matmul", layout)
