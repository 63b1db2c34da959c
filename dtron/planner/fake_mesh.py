"""One rank of a mesh of any size, in one process without a network.

A fake process group has a size and a rank, and sends nothing. A DeviceMesh of 16,384 ranks would
make thousands of groups, one for each row of each axis. A plan needs the groups of one rank, so
only these are made. Ranks of one mesh have equal shards but for the last, smaller shards of dims
that the mesh does not divide. So rank 0 of a stage is the rank with the most of everything, and a
plan is of this rank, if no other rank is asked for."""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import join_fake_group


def fake_mesh(shape: MeshShape, rank: int = 0) -> DeviceMesh | None:
    """Return the mesh of one pipeline stage as one of its ranks sees it; None for one rank."""
    atoms = {a: n for a, n in shape.atoms.items() if a != "pp"}
    if not atoms:
        return None
    join_fake_group(math.prod(atoms.values()) + 1)
    return _mesh(tuple(atoms), tuple(atoms.values()), rank, dist.get_world_size())


@cache
def _mesh(names: tuple[str, ...], sizes: tuple[int, ...], rank: int, world: int) -> DeviceMesh:
    """Build each mesh once. torch keeps plans of redistributions with the groups of a mesh, and
    uses them for any mesh with the same numbers. This process is number 0, for ever. All other
    numbers depend on the size of the world, which changes when its groups are made anew."""
    size = math.prod(sizes)
    ranks = torch.arange(world - size, world)
    ranks[rank] = 0
    ranks = ranks.view(sizes)
    rows = [
        next(row for row in ranks.movedim(i, -1).reshape(-1, n).tolist() if 0 in row)
        for i, n in enumerate(sizes)
    ]
    groups = [dist.new_group(row, backend="fake") for row in rows]
    return DeviceMesh.from_group(groups, "cpu", mesh=ranks, mesh_dim_names=names)
