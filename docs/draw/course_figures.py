"""Figures of the course, from real DTensors on simulated ranks; see figures.py."""

from __future__ import annotations

import torch
from layer_figures import draw, pieces_of
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import shard
from dtron.distributed.simulated_ranks import simulated
from dtron.mesh import Layout
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
            larger = [(rank, [(SCALE * a, SCALE * b) for a, b in box]) for rank, box in pieces]
            axes = zip(mesh.mesh_dim_names, placements, strict=True)
            caption = ", ".join(f"{axis}: {p}" for axis, p in axes)
            tensor = TensorPicture(name, caption, (10 * SCALE, 6 * SCALE), larger)
            x += draw_tensor(canvas, x, y, tensor, shape)[0] + 40
    return canvas.svg()


def gradient_of_a_scale(shape: MeshShape) -> str:
    """Draw the tensors of a norm whose tokens are sharded, and the gradient of its scale before and
    after the sum."""
    canvas = Canvas(900)
    with simulated(shape) as mesh:
        layout = Layout(mesh)
        y = draw_mesh(canvas, 20, 20, shape) + 16
        x_TD = layout.shard(torch.zeros(1024, 384), "tokens_sp", "act_embed")
        scale_D = layout.shard(torch.zeros(384), "act_embed")
        pending = DTensor.from_local(torch.zeros(384), mesh, [Partial()] * mesh.ndim)
        x = 20.0
        for name, dims, tensor in (
            ("x_TD", "TD", x_TD),
            ("scale", "D", scale_D),
            ("its gradient", "D", pending),
            ("after the all-reduce", "D", scale_D),
        ):
            x += draw(canvas, x, y, name, dims, tensor, shape) + 40
    return canvas.svg()
