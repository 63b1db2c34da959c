"""One rank of a mesh of any size, in one process without a network.

A fake process group has a size and a rank, and sends nothing. A DeviceMesh of 16,384 ranks would
make thousands of groups, one for each row of each axis. A plan needs the groups of one rank, so
only these are made. Ranks of one mesh have equal shards but for the last, smaller shards of dims
that the mesh does not divide. So rank 0 of a stage is the rank with the most of everything."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from dtron.distributed.mesh_shape import MeshShape


@contextmanager
def fake_mesh(shape: MeshShape) -> Iterator[DeviceMesh | None]:
    """Yield the mesh of one pipeline stage as its first rank sees it; None for one rank."""
    atoms = {a: n for a, n in shape.atoms.items() if a != "pp"}
    if not atoms:
        yield None
        return
    names, sizes = tuple(atoms), tuple(atoms.values())
    size = math.prod(sizes)
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        ranks = torch.arange(size).view(sizes)
        groups = []
        for i in range(len(sizes)):
            row = ranks.movedim(i, -1).reshape(-1, sizes[i])[0].tolist()
            groups.append(dist.new_group(row, backend="fake"))
        group = groups if len(groups) > 1 else groups[0]
        yield DeviceMesh.from_group(group, "cpu", mesh=ranks, mesh_dim_names=names)
    finally:
        dist.destroy_process_group()
