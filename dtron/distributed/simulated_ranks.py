"""Many simulated ranks in one process: the basis of property tests, ``--simulate`` and
``dtron.verify``.

``LocalTensorMode`` replaces every rank-local tensor by one value per rank. It runs each operation
once for each rank, and collectives move values between ranks. The program is the same as on real
ranks, DTensor included. It is slower by the number of ranks, and it needs no GPU, no torchrun and
no network.

LocalTensorMode is private to torch, and so is the fake process group that gives its groups their
names. Only this file imports them. They cannot draw random numbers per rank, and they cannot time
anything; nothing here relies on either. dtron draws whole weights outside the mode, and slices
them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed._local_tensor import (
    LocalTensor,
    LocalTensorMode,
    maybe_disable_local_tensor_mode,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from dtron.distributed.mesh_shape import MeshShape


@contextmanager
def simulated(shape: MeshShape) -> Iterator[DeviceMesh | None]:
    """Run the body on ``shape.size`` simulated ranks. Yields the stage's DeviceMesh; None for one
    rank."""
    axes = tuple((a, n) for a, n in shape.atoms.items() if a != "pp")
    if not axes:
        yield None
        return
    mesh = _mesh(axes)
    with LocalTensorMode(mesh.size()):
        yield mesh


def one_rank(x: torch.Tensor) -> torch.Tensor:
    """Return rank 0's value of a simulated tensor, and any other tensor as it is."""
    return x._local_tensors[0] if isinstance(x, LocalTensor) else x


def is_simulated(x: torch.Tensor) -> bool:
    return isinstance(x, LocalTensor)


def by_rank(x: torch.Tensor, rank: int) -> dict[int, torch.Tensor]:
    """Return ``{rank: value}``: every rank's value of a simulated tensor; any other tensor is the
    value of ``rank`` alone."""
    return dict(x._local_tensors) if isinstance(x, LocalTensor) else {rank: x}


@contextmanager
def paused() -> Iterator[None]:
    """Pause the simulation, so that new tensors are plain tensors again. It is for code that
    allocates tensors and does not know about ranks."""
    with maybe_disable_local_tensor_mode():
        yield


@cache
def _mesh(axes: tuple[tuple[str, int], ...]) -> DeviceMesh:
    """Build each mesh once. DTensor plans redistributions per mesh, and two meshes are equal only
    if they are the same object."""
    size = math.prod(n for _, n in axes)
    if dist.is_initialized() and dist.get_world_size() < size:
        dist.destroy_process_group()
        _mesh.cache_clear()
    if not dist.is_initialized():
        dist.init_process_group("fake", rank=0, world_size=max(size, 64), store=FakeStore())
    ranks = torch.arange(size).view([n for _, n in axes])
    return DeviceMesh("cpu", ranks, mesh_dim_names=tuple(a for a, _ in axes))
