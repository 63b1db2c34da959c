"""Small values that tests of single functions share."""

from __future__ import annotations

import torch
from torch import Tensor

from dtron.config import ModelConfig
from dtron.mesh import Layout

ONE, F64 = Layout(), torch.float64
SMALL = ModelConfig(vocab=50, embed=24, layers=2, heads=4, kv_heads=2, head_dim=6, mlp=40, vocab_multiple=8)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def close(got, want, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
