"""Pictures of a norm whose tokens are sharded: the gradient of its scale before and after sums."""

from __future__ import annotations

from collections.abc import Collection
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from dtron.course.views.tensors import draw
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import by_rank, simulated
from dtron.errors import UserError
from dtron.mesh import Layout
from dtron.tools.charts import Scale
from dtron.tools.drawing import FAINT, Canvas, colour, draw_mesh
from dtron.tools.shard_shapes import coordinates

TOKENS, WIDTH = 24, 4


def gradient_of_a_scale(shape: MeshShape) -> str:
    """Draw the tensors of a norm whose tokens are sharded, and the gradient of its scale before and
    after the sum."""
    canvas = Canvas(900)
    with simulated(shape) as mesh:
        assert mesh is not None  # the figure has two ranks or more
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


def summands(mesh: str) -> tuple[dict[int, Tensor], Tensor]:
    """Return the gradient of the scale on each rank, from its own tokens, and on one device. Raises
    UserError if the mesh has one rank, or does not divide the tokens."""
    shape = MeshShape.parse(mesh)
    if shape.size == 1 or TOKENS % shape.size:
        raise UserError(f"mesh {mesh}: its ranks must divide {TOKENS} tokens, and be two or more")
    x_TD = torch.linspace(-1, 2, TOKENS * WIDTH, dtype=torch.float64).view(TOKENS, WIDTH)
    with simulated(shape) as device_mesh:
        own = Layout(device_mesh).shard(x_TD, "tokens_sp", "act_embed")
        assert isinstance(own, DTensor)
        rows = by_rank(own.to_local(), 0)
    return {rank: _gradient(x) for rank, x in rows.items()}, _gradient(x_TD)


def _gradient(x_TD: Tensor) -> Tensor:
    """Return the gradient of the scale s of y = rms(x) s, for a loss that is the sum of y^2 / 2."""
    scale_D = torch.ones(WIDTH, dtype=torch.float64, requires_grad=True)
    y_TD = x_TD * (x_TD.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * scale_D
    return torch.autograd.grad(y_TD.square().sum() / 2, scale_D)[0]


def sums(mesh: str, over: Collection[str]) -> dict[int, Tensor]:
    """Return the gradient of each rank after a sum over these mesh axes."""
    own, _ = summands(mesh)
    atoms = MeshShape.parse(mesh).atoms
    at = dict(coordinates(list(atoms.values())))

    def same(a: int, b: int) -> bool:
        pairs = zip(atoms, at[a], at[b], strict=True)
        return all(i == j for axis, i, j in pairs if axis not in over)

    return {r: torch.stack([own[o] for o in own if same(r, o)]).sum(0) for r in own}


def gradient(mesh: str, over: str = "") -> str:
    """Draw the gradient of the scale on each rank after a sum over some mesh axes, beside the
    gradient of one device.

    ``over``: mesh axes, as ``dp tp``; axes that the mesh lacks change nothing."""
    shape, canvas = MeshShape.parse(mesh), Canvas(900)
    found, (_, right) = sums(mesh, over.split()), summands(mesh)
    scale = Scale(float(right.abs().max()), 120, 130)
    what = f"after a sum over {over}" if over else "from each rank's own tokens, without a sum"
    canvas.text(20, 24, f"The gradient of the scale on {mesh}, {what}", bold=True, size=14)
    rows = [("one device", right, "#888")]
    rows += [(f"rank {rank}", g, colour(rank, shape)) for rank, g in found.items()]
    for i, (name, g, fill) in enumerate(rows):
        y = 44 + 26 * i
        canvas.text(20, y + 14, name)
        for d, value in enumerate(g.tolist()):
            canvas.rect(120 + 150 * d, y, scale.size(abs(value)), 18, fill)
        same = torch.allclose(g, right)
        canvas.text(730, y + 14, "right" if same else "wrong", bold=same, colour=FAINT)
    ranks = prod(n for a, n in shape.sizes.items() if a in over.split())
    y = 44 + 26 * len(rows) + 18
    canvas.text(20, y, f"each rank has the tokens of {ranks} of {shape.size} ranks in it")
    return canvas.svg()
