"""The figure of docs/experts.md: one mesh in two views, and the collectives of an MoE layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dtron.course.views.layer import COLOURS
from dtron.course.views.tensors import draw
from dtron.distributed.mesh_shape import MeshShape, parts
from dtron.distributed.simulated_ranks import simulated
from dtron.mesh import Layout
from dtron.moe.config import MoEConfig
from dtron.moe.layer import MoELayer, moe
from dtron.moe.router import TokenInfo
from dtron.params import declare, init, unshard
from dtron.tools.count_collectives import CollectiveCounter
from dtron.tools.drawing import FAINT, Canvas, colour, draw_mesh
from dtron.tools.show import coordinates

DIMS = {
    "embed": 512,
    "expert_embed": 512,
    "experts": 8,
    "expert_mlp": 256,
    "layers": 1,
    "mlp": 1024,
    "shared_mlp": 1024,
    "gated": True,
    "bias": False,
    "expert_bias": False,
    "router_bias": False,
    "balance_bias": False,
    "shared_expert": True,
    "shared_gate": False,
}


def view(canvas: Canvas, x: float, y: float, shape: MeshShape) -> None:
    """Draw the ranks with edp down and ep across."""
    atoms = shape.atoms

    def place(at: Sequence[int], axis: str) -> int:
        return _flat([(i, n) for (a, n), i in zip(atoms.items(), at) if a in parts(atoms, axis)])

    for rank, at in coordinates(list(atoms.values())):
        row, column = place(at, "edp"), place(at, "ep")
        left, top = x + 60 + column * 67, y + row * 33
        canvas.rect(left, top, 64, 30, colour(rank, shape))
        canvas.text(left + 32, top + 19, str(rank), anchor="middle")
        canvas.text(x, top + 19, f"edp {row}", colour=FAINT)
        if row == 0:
            canvas.text(left + 32, y - 6, f"ep {column}", colour=FAINT, anchor="middle")


def _flat(pairs: list[tuple[int, int]]) -> int:
    place = 0
    for i, n in pairs:
        place = place * n + i
    return place


def experts(shape: MeshShape) -> str:
    c = MoEConfig(DIMS["experts"], 2, DIMS["expert_mlp"], shared=DIMS["shared_mlp"])
    canvas = Canvas(1060)
    canvas.text(20, 28, f"{shape}: one mesh of {shape.size} ranks", bold=True, size=16)
    atoms = ", ".join(f"{a}={n}" for a, n in shape.atoms.items())
    canvas.text(20, 48, f"its dims are the atoms {atoms}", colour=FAINT)
    canvas.text(20, 80, "for the dense layers: dp down, tp across", bold=True)
    draw_mesh(canvas, 20, 112, shape)
    canvas.text(440, 80, "for experts: edp down, ep across", bold=True)
    view(canvas, 440, 112, shape)
    top = 120 + 33 * max(shape.size // shape.tp, shape.edp) + 40
    with simulated(shape) as mesh:
        layout = Layout(mesh)
        p = init(declare(MoELayer, DIMS), DIMS, 0, layout)
        x = layout.shard(torch.ones(2048, 512), "tokens_sp", "act_embed")
        canvas.text(20, top, "who holds which part, at rest (zero 1 to 3)", bold=True)
        left = 20.0
        for name, dims, tensor in (
            ("x_TD", "TD", x),
            ("a dense w_up", "DF", p.shared.w_up),
            ("w_up of 8 experts", "EDF", p.experts.w_up),
        ):
            left += draw(canvas, left, top + 14, name, dims, tensor, shape) + 40
        canvas.text(left, top + 26, "gathered over edp, for compute", bold=True)
        w_up = unshard(p.experts, layout).w_up
        draw(canvas, left, top + 36, "w_up of 8 experts", "EDF", w_up, shape)
        ones = layout.shard(torch.ones(2048), "tokens_sp")
        seen = TokenInfo(ones > 0, ones.long() * 0, 1)
        p = gather_but_shared(p, layout)
        with CollectiveCounter(mesh) as counter:
            moe(p, x, seen, c, layout)
    y = top + 200
    canvas.text(20, y, "forward of the experts, in order:", bold=True)
    for n, collective in enumerate(counter.order):
        what = ("counts", "tokens to their experts", "and back")[n]
        text = f"{collective.kind.replace('_', '-')} over {collective.axis}: {what}"
        canvas.text(20 + n * 330, y + 22, text, colour=COLOURS.get(collective.kind, "#8050c0"))
    return canvas.svg()


def gather_but_shared(p: MoELayer, layout: Layout) -> MoELayer:
    """Return gathered weights without the shared expert, which is a dense layer."""
    p = unshard(p, layout)
    return MoELayer(p.router, p.experts, None, None)
