"""Figures of the course, from real DTensors on simulated ranks; see figures.py."""

from __future__ import annotations

import torch
from torch.distributed.tensor import Replicate, Shard

from dtron.course.views.tensors import larger, pieces_of
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import shard
from dtron.distributed.simulated_ranks import simulated
from dtron.tools.drawing import Canvas, TensorPicture, draw_mesh, draw_tensor

SCALE = 200  # small tensors are drawn larger


def uneven_shards(shape: MeshShape) -> str:
    """Draw small tensors whose dims the mesh does not divide."""
    cases = [
        ("(10, 6), two dims", (Shard(0), Shard(1))),
        ("(10, 6), both axes on one dim", (Shard(0), Shard(0))),
        ("(10, 6), one axis", (Replicate(), Shard(1))),
    ]
    canvas = Canvas(900)
    with simulated(shape) as mesh:
        y = draw_mesh(canvas, 20, 20, shape) + 16
        x = 20.0
        for name, placements in cases:
            pieces = pieces_of(shard(torch.zeros(10, 6), mesh, placements))
            axes = zip(mesh.mesh_dim_names, placements, strict=True)
            caption = ", ".join(f"{axis}: {p}" for axis, p in axes)
            tensor = TensorPicture(name, caption, (10 * SCALE, 6 * SCALE), larger(pieces, SCALE))
            x += draw_tensor(canvas, x, y, tensor, shape)[0] + 40
    return canvas.svg()
