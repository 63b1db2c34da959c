"""Pictures of DTensors: who holds which shard."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from dtron.checkpoint.shard_range import Range
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import simulated
from dtron.errors import UserError
from dtron.mesh import Layout
from dtron.rules import RULES, Rules
from dtron.tools.drawing import FAINT, Canvas, TensorPicture, draw_mesh, draw_tensor
from dtron.tools.shard_shapes import coordinates, local_range, local_shape

Pieces = list[tuple[int, list[Range]]]
_LARGEST = 2000  # a small tensor is drawn as if its larger dim had this size


def pieces_of(x: DTensor) -> Pieces:
    """Return the shard of a DTensor on each rank, from its placements."""
    sizes = tuple(x.device_mesh.shape)
    return [
        (rank, local_range(x.shape, sizes, x.placements, at)) for rank, at in coordinates(sizes)
    ]


def pending(x: DTensor) -> str:
    """Return the mesh axes over which a sum is pending."""
    names = axis_names(x.device_mesh)
    return "+".join(a for a, p in zip(names, x.placements, strict=True) if p.is_partial())


def axis_names(mesh: DeviceMesh) -> tuple[str, ...]:
    names = mesh.mesh_dim_names
    assert names is not None  # every mesh of dtron has names
    return names


def caption(x: DTensor, dims: str) -> str:
    """Return ``[T@dp+tp, D]``: each dim with the mesh axes that shard it.

    ``dims``: a letter for each dim."""
    sharded_by: list[list[str]] = [[] for _ in dims]
    for axis, p in zip(axis_names(x.device_mesh), x.placements, strict=True):
        if isinstance(p, Shard):
            sharded_by[p.dim].append(axis)
    named = (d + "@" * bool(a) + "+".join(a) for d, a in zip(dims, sharded_by, strict=True))
    return f"[{', '.join(named)}]"


def draw(
    canvas: Canvas, x: float, y: float, name: str, dims: str, t: Tensor, shape: MeshShape
) -> float:
    """Draw a DTensor with its shards and return the width.

    ``dims``: a letter for each dim."""
    assert isinstance(t, DTensor)  # a figure has two ranks or more
    tensor = TensorPicture(name, caption(t, dims), tuple(t.shape), pieces_of(t), pending(t))
    width, _ = draw_tensor(canvas, x, y, tensor, shape)
    return width


def larger(pieces: Pieces, scale: int) -> Pieces:
    """Return the shards of a tensor that is larger in all dims."""
    return [(rank, [(scale * a, scale * b) for a, b in box]) for rank, box in pieces]


def shards(
    mesh: str,
    axes: tuple[str, str] = ("embed", "mlp"),
    rows: int = 10,
    columns: int = 6,
    rules: Rules = RULES,
) -> str:
    """Draw a matrix on a mesh, and list the shard of each rank.

    ``axes``: the logical axes of its rows and columns.
    ``rules``: the table that places them."""
    shape, canvas = MeshShape.parse(mesh), Canvas(900)
    with simulated(shape) as device_mesh:
        if device_mesh is None:
            raise UserError(f"mesh {mesh}: it has one rank, so nothing is sharded; take more")
        x = Layout(device_mesh, rules).shard(torch.zeros(rows, columns), *axes)
        assert isinstance(x, DTensor)
        pieces, placements = pieces_of(x), x.placements
        sizes, names = tuple(device_mesh.shape), axis_names(device_mesh)
    by_axis = ", ".join(f"{a}: {p}" for a, p in zip(names, placements, strict=True))
    canvas.text(20, 24, f"[{rows}, {columns}], {axes[0]} and {axes[1]}, on {mesh}", bold=True)
    canvas.text(20, 44, f"placements ({by_axis})", colour=FAINT)
    y, scale = draw_mesh(canvas, 20, 60, shape) + 24, _LARGEST // max(rows, columns)
    size = (scale * rows, scale * columns)
    tensor = TensorPicture("the matrix", "", size, larger(pieces, scale))
    draw_tensor(canvas, 20, y, tensor, shape)
    for rank, at in coordinates(sizes):
        local = local_shape((rows, columns), sizes, placements, at)
        (top, _), (left, _) = pieces[rank][1]
        line = f"rank {rank}: {list(local)}"
        line += f" from [{top}, {left}]" if all(local) else ", empty"
        canvas.text(320 + 260 * (rank // 16), y + 40 + 18 * (rank % 16), line)
    return canvas.svg()
