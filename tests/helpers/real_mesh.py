"""The meshes of real ranks in the jobs of a pool.

A gloo group has two threads, and one of them wakes a hundred times a second while the process
lives. The groups of some hundred meshes took as much of the CPU as a test. So each rank builds each
mesh once, and a job destroys the groups of its pipeline."""

from functools import cache

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dtron.distributed.mesh_shape import MeshShape
from dtron.mesh import build_mesh
from dtron.training.pipeline import Pipeline


@cache
def real_mesh(mesh: str) -> DeviceMesh | None:
    """The mesh over the ranks of the pool. All ranks call this function in the same order."""
    return build_mesh(MeshShape.parse(mesh), "cpu")


def destroy_groups(pipe: Pipeline) -> None:
    """Destroy the groups between the ranks of a pipeline, if it has any."""
    if pipe.groups is not None:
        for group in (*pipe.groups.by_pair.values(), pipe.groups.line):
            dist.destroy_process_group(group)
