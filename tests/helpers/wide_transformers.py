"""transformers' layers in float64. Some of them compute in float32 whatever their inputs are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch


class _Wide:
    """torch, in which the name float32 stands for float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def module_of(made: torch.nn.Module) -> ModuleType:
    """The module of transformers that defines this model."""
    return sys.modules[type(made).__module__]


@contextmanager
def in_float64(modeling: ModuleType) -> Iterator[None]:
    """Let a module of transformers compute in float64 where it names float32."""
    with (
        mock.patch.object(modeling, "torch", _Wide()),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield
