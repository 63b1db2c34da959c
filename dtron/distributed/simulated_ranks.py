"""Many ranks in one process: what property tests, ``--simulate`` and ``dtron.verify`` stand on.

``LocalTensorMode`` replaces every rank-local tensor by one value per rank and runs each operation
once for each of them; collectives move values between them. The program is the one that runs on
real ranks, DTensor and all, only slower by the number of ranks, and it needs no GPU, no torchrun
and no network.

LocalTensorMode and the fake process group that names its groups are private to torch: this file
alone imports them. What they cannot do, and so nothing here relies on: draw random numbers per rank
(dtron draws whole weights, outside the mode, and slices), and time anything.
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
    """Run the body on ``shape.size`` simulated ranks; yields the stage's DeviceMesh (None for one
    rank)."""
    axes = tuple((a, n) for a, n in shape.atoms.items() if a != "pp")
    if not axes:
        yield None
        return
    mesh = _mesh(axes)
    with LocalTensorMode(mesh.size()):
        yield mesh


def one_rank(x: torch.Tensor) -> torch.Tensor:
    """Rank 0's value of a simulated tensor; any other tensor as it is."""
    return x._local_tensors[0] if isinstance(x, LocalTensor) else x


def is_simulated(x: torch.Tensor) -> bool:
    return isinstance(x, LocalTensor)


def by_rank(x: torch.Tensor, rank: int) -> dict[int, torch.Tensor]:
    """Every rank's value of a simulated tensor; that of this ``rank`` of any other."""
    return dict(x._local_tensors) if isinstance(x, LocalTensor) else {rank: x}


@contextmanager
def paused() -> Iterator[None]:
    """Inside a simulation, make plain tensors again: for code that allocates and knows nothing of
    ranks."""
    with maybe_disable_local_tensor_mode():
        yield


@cache
def _mesh(axes: tuple[tuple[str, int], ...]) -> DeviceMesh:
    """Meshes are built once: DTensor plans per mesh, and two meshes are equal only if they are the
    same one."""
    size = math.prod(n for _, n in axes)
    if dist.is_initialized() and dist.get_world_size() < size:
        dist.destroy_process_group()
        _mesh.cache_clear()
    if not dist.is_initialized():
        dist.init_process_group("fake", rank=0, world_size=max(size, 64), store=FakeStore())
    ranks = torch.arange(size).view([n for _, n in axes])
    return DeviceMesh("cpu", ranks, mesh_dim_names=tuple(a for a, _ in axes))
