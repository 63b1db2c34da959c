"""The comparison of steps in few bits, on steps made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dtron.tools.compare_steps import StepResult, compare_rounded

RATE, N = 1e-3, 256
START = torch.zeros(N, dtype=torch.float64)


def step(signs: Tensor) -> StepResult:
    """Adam's first step from zero: each number moves by the rate."""
    weights = START - RATE * signs
    return StepResult(1.0, 1.0, (signs,), (weights,), {}, None, (START,))


def flipped(count: int) -> Tensor:
    return torch.where(torch.arange(N) < count, -1.0, 1.0).double()


@pytest.mark.parametrize(("count", "passes"), [(0, True), (2, True), (N // 8, False), (N, False)])
def test_rounding_decides_few_signs(count, passes):
    """One device has no other sign, by chance. A mesh that updates wrongly has many."""
    want, got = step(flipped(0)), step(flipped(count))
    rows = compare_rounded(want, want, got)[1]
    assert (rows[0].weight <= 1) == passes


def test_rounding_decides_the_signs_of_small_gradients():
    """A bias of few numbers: one other sign is more than a quarter of its change."""
    small = torch.where(torch.arange(N) < N // 8, 1e-3, 1.0).double()
    want, one, got = step(small), step(small + 2e-3), step(torch.where(small < 1, -small, small))
    assert compare_rounded(want, one, got)[1][0].weight <= 1
    wrong = step(torch.where(torch.arange(N) < N // 4, -small, small))
    assert compare_rounded(want, one, wrong)[1][0].weight > 1
