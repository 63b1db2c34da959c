"""A picture of a layer on a mesh: its tensors, and the collectives between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dtron.course.views.tensors import draw
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import simulated
from dtron.errors import UserError
from dtron.layers.mlp import MLP, mlp
from dtron.mesh import Layout
from dtron.params import declare, init, unshard
from dtron.tools.count_collectives import Collective, CollectiveCounter
from dtron.tools.drawing import FAINT, Canvas, draw_mesh
from dtron.tools.memory_estimate import size

COLOURS = {"all_gather": "#4a8fd0", "reduce_scatter": "#50b060", "all_reduce": "#d05050"}


@dataclass(frozen=True)
class Recorder(Layout):
    """A layout that records the input and the output of every ``constrain``."""

    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def constrain(self, x: Tensor, *axes: str | None) -> Tensor:
        y = super().constrain(x, *axes)
        self.seen.append((x.detach(), y.detach()))
        return y


def layer(shape: MeshShape, tokens: int = 1024) -> str:
    """Draw the tensors of an MLP from left to right."""
    dims = {"embed": 384, "mlp": 1280, "gated": True, "bias": False, "layers": 1}
    with simulated(shape) as mesh:
        layout = Recorder(mesh)
        p = unshard(init(declare(MLP, dims), dims, 0, layout), layout)
        x = layout.shard(torch.ones(tokens, 384), "tokens_sp", "act_embed")
        with CollectiveCounter(mesh) as counter:
            mlp(p, x, layout)
        (x_before, x_after), (y_before, y_after) = layout.seen
        canvas = Canvas(1180)
        first, second = counter.order
        steps: list[tuple[str, str, Tensor, Collective | str]] = [
            ("x_TD", "TD", x_before, first),
            ("x_TD", "TD", x_after, "@"),
            ("w_gate, w_up", "DF", p.w_up, "="),
            ("h_TF", "TF", x_after @ p.w_up, "@"),
            ("w_down", "FD", p.w_down, "="),
            ("y_TD", "TD", y_before, second),
            ("y_TD", "TD", y_after, ""),
        ]
        flow(canvas, "An MLP", steps, shape)
    return canvas.svg()


def flow(
    canvas: Canvas,
    name: str,
    steps: Sequence[tuple[str, str, Tensor, Collective | str]],
    shape: MeshShape,
) -> float:
    """Draw the mesh, and below it tensors from left to right, each followed by its operation or
    collective. Returns the upper end of the tensors."""
    canvas.text(20, 28, f"{name} on {shape}", bold=True, size=16)
    draw_mesh(canvas, 20, 44, shape)
    left, top = 20.0, 70 + 33 * shape.size / shape.tp + 16
    for name, letters, tensor, then in steps:
        left += draw(canvas, left, top, name, letters, tensor, shape) + 10
        if isinstance(then, Collective):
            arrow(canvas, left, top + 76, then)
            left += 108
        elif then:
            canvas.text(left, top + 80, then, size=16, bold=True)
            left += 26
    return top


def arrow(canvas: Canvas, x: float, y: float, collective: Collective) -> None:
    canvas.arrow(x, y, 98)
    canvas.text(
        x, y - 8, collective.kind.replace("_", "-"), size=12, colour=COLOURS[collective.kind]
    )
    canvas.text(x, y + 16, f"over {collective.axis}", size=11, colour=FAINT)


def messages(mesh: str, tokens: int = 1024) -> dict[Collective, int]:
    """Return the bytes of each collective in forward and backward of an MLP, counted on simulated
    ranks. ``tokens`` of 384 numbers in float32. See ``CollectiveCounter`` for what is counted."""
    dims = {"embed": 384, "mlp": 1280, "gated": True, "bias": False, "layers": 1}
    shape = MeshShape.parse(mesh)
    if shape.tp == 1 or 1280 % shape.tp or tokens % (shape.size):
        raise UserError(f"mesh {mesh}: tp must divide 1280, and all ranks {tokens} tokens")
    with simulated(shape) as device_mesh, CollectiveCounter(device_mesh) as counter:
        layout = Layout(device_mesh)
        p = unshard(init(declare(MLP, dims), dims, 0, layout), layout)
        x = layout.shard(torch.ones(tokens, 384), "tokens_sp", "act_embed").requires_grad_()
        counter.count.clear(), counter.bytes.clear()
        y = mlp(p, x, layout)
        torch.autograd.grad(y, x, torch.ones_like(y))
    return dict(counter.bytes)


def layer_and_messages(mesh: str, tokens: int = 1024) -> str:
    """Draw an MLP on a mesh, above the bytes of its messages."""
    sent = messages(mesh, tokens)
    lines = (
        f"<li>{c.kind.replace('_', '-')} over {c.axis}: {size(n)}</li>" for c, n in sent.items()
    )
    picture = layer(MeshShape.parse(mesh), tokens)
    return f"{picture}<p>Forward and backward, to the input:</p><ul>{''.join(lines)}</ul>"
