"""Models and rows that compile in seconds, and a mesh of which only one rank is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import simulated
from dtron.mesh import Layout
from dtron.training.compiled_units import CompiledUnits
from dtron.training.traced_function import GraphCompiler
from tests.helpers.runs import MODEL

ONE = Layout()
# Compiling takes seconds a layer, and real ranks all compile.
BLOCK = replace(MODEL, layers=1)
ROWS = torch.arange(8 * 17).view(8, 17) % 61
DOCUMENTS = (ROWS[:, :-1] % 5 == 0).cumsum(1)
HARD = replace(BLOCK, window=5, softcap=2.0, sinks=True)  # with documents, every feature of a mask


def lone_rank(mesh: str) -> DeviceMesh:
    """A mesh of which this process is rank 0. The other ranks do not exist. The process issues the
    collectives that rank 0 would issue."""
    with simulated(MeshShape.parse(mesh)) as devices:
        return devices  # the mesh outlives its simulation


def as_unit(fn: Callable) -> Callable:
    """A function of tensors and plain values, compiled as a stage compiles its units."""
    units = CompiledUnits(None, GraphCompiler())

    def outputs(*args: Any) -> tuple[torch.Tensor, ...]:
        y = fn(*args)
        return y if isinstance(y, tuple) else (y,)

    def run(*args: Any) -> Any:
        y = units(outputs, *args)
        return y if len(y) > 1 else y[0]

    return run
