"""Matmuls with rounded factors and sums in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dtron.layers.delta_rule import DeltaTokens, delta_rule, delta_rule_by_token
from dtron.layers.ssd import SSDTokens, ssd, ssd_by_token
from dtron.layers.wide_product import wide_product

BF16 = torch.bfloat16


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def rounded(x: Tensor) -> Tensor:
    return x.detach().to(BF16).to(x.dtype)


def test_factors_are_rounded_and_sums_are_not():
    torch.manual_seed(0)
    a, b, g = normal(3, 2, 5, 7), normal(3, 2, 7, 4), normal(3, 2, 5, 4).detach()
    y = wide_product(a, b, BF16)
    da, db = torch.autograd.grad(y, (a, b), g)
    torch.testing.assert_close(y.detach(), rounded(a) @ rounded(b), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(da, rounded(g) @ rounded(b).mT, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(db, rounded(a).mT @ rounded(g), rtol=1e-6, atol=1e-6)
    # A matmul in bfloat16 would round the result.
    assert not torch.equal(y.detach(), rounded(y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_rounded_to_a_dtype_that_is_not_narrower(dtype):
    a, b = normal(2, 5, 7, dtype=dtype), normal(2, 7, 4, dtype=dtype)
    assert torch.equal(wide_product(a, b, dtype), a @ b)


def tokens(dtype: torch.dtype) -> DeltaTokens:
    """Values in few bits, so that they are the same numbers in both dtypes."""
    torch.manual_seed(0)
    q, k, v = (rounded(torch.randn(2, 96, 3, 16)).to(dtype) for _ in range(3))
    k = k / 4  # keys of a norm near 1
    log_decay, beta = -torch.rand(2, 96, 3, 1, dtype=dtype) / 8, torch.rand(2, 96, 3, dtype=dtype)
    return DeltaTokens(q, k, v, log_decay, beta)


def error(x: Tensor, truth: Tensor) -> float:
    return ((x.double() - truth.double()).norm() / truth.double().norm()).item()


def test_the_delta_rule_in_bfloat16():
    """Close to the rule token by token in float64: a few roundings, and no drift with the state."""
    exact = tokens(torch.float64)
    o, state = delta_rule_by_token(exact)
    narrow = DeltaTokens(*(x.to(BF16) for x in exact[:3]), *(x.float() for x in exact[3:5]))
    got, last = delta_rule(narrow, chunk=32)
    assert got.dtype == BF16 and error(got, o) < 0.01
    assert last.dtype == torch.float32 and error(last, state) < 0.01


def test_ssd_in_bfloat16():
    exact = tokens(torch.float64)
    shared = exact.q[:, :, :1], exact.k[:, :, :1]  # one group
    o, state = ssd_by_token(SSDTokens(*shared, exact.v, exact.log_decay[..., 0]))
    given = *(x.to(BF16) for x in (*shared, exact.v)), exact.log_decay[..., 0].float()
    got, last = ssd(SSDTokens(*given), chunk=32)
    assert got.dtype == BF16 and error(got, o) < 0.01
    assert error(last, state) < 0.01
