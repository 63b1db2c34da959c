"""A picture of Muon: the owner of each matrix, and the collectives of an update."""

from __future__ import annotations

from collections import Counter

from dtron.course.views.layer import COLOURS
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import simulated
from dtron.mesh import Layout
from dtron.model.config import ModelConfig
from dtron.model.transformer import declare_model
from dtron.params import init
from dtron.tools.count_collectives import CollectiveCounter
from dtron.tools.drawing import FAINT, Canvas
from dtron.training.linear_weight import LinearWeight, dealt, is_matrix
from dtron.training.optim_config import OptimConfig, build_optimizer
from dtron.training.optimizer import apply_update, init_state
from dtron.training.update_scalars import UpdateScalars
from dtron.tree import flat

FILLS = ("#8fb8e8", "#9fd8a8", "#e8c88f", "#d8a0c8", "#a0d0d8", "#c8c0f0")


def owners(shape: MeshShape, m: ModelConfig) -> str:
    """Draw the matrices of each rank, as wide as their work, and count a real update's
    collectives."""
    canvas = Canvas(1080)
    spec = declare_model(m)
    with simulated(shape) as mesh:
        layout = Layout(mesh)
        params = init(spec, m.dims(), 0, layout)
        pairs = zip(flat(spec), flat(params), strict=True)
        weights = [LinearWeight(s, w, w, w, None, False) for s, w in pairs if is_matrix(s)]
        work = dealt(weights, layout)
        optimizer = build_optimizer(OptimConfig(name="muon"))
        state = init_state(optimizer, spec, params)
        with CollectiveCounter(mesh) as counter:
            apply_update(optimizer, spec, params, params, state, UpdateScalars(0.1), layout)
    held: dict[int, list[LinearWeight]] = {rank: [] for rank in range(shape.size)}
    for one in work:
        for rank, row in enumerate(one.slots):
            held[rank] += [one.weights[i] for i in row if i is not None]
    most = max(sum(w.cost for w in ws) for ws in held.values())
    canvas.text(20, 28, f"Muon on {shape}: the owner of each matrix", bold=True, size=16)
    canvas.text(20, 48, f"{m.layers} blocks; a box is as wide as its work", colour=FAINT)
    for rank, ws in held.items():
        x, y = 90.0, 64 + rank * 36
        canvas.text(20, y + 19, f"rank {rank}")
        for w in ws:
            _, block, *_, name = w.spec.path.split(".")
            width = 940 * w.cost / most
            canvas.rect(x, y, width - 2, 30, FILLS[int(block) % len(FILLS)])
            if width > 56:
                canvas.text(x + 5, y + 19, f"{name.removeprefix('w_')} {block}")
            x += width
    y = 64 + shape.size * 36 + 24
    canvas.text(20, y, "collectives of the update:", bold=True)
    found = Counter((c.kind, c.axis) for c in counter.order)
    for i, ((kind, axis), n) in enumerate(found.items()):
        colour = COLOURS.get(kind, "#8050c0")
        canvas.text(220 + 230 * i, y, f"{n} x {kind.replace('_', '-')} over {axis}", colour=colour)
    canvas.text(
        20, y + 20, f"{len(work)} kinds of matrices, to their owners and back", colour=FAINT
    )
    return canvas.svg()


def owners_on(mesh: str, layers: int) -> str:
    """Draw the owners of the matrices of a small model with so many blocks."""
    m = ModelConfig(layers=layers, embed=96, heads=6, kv_heads=6, head_dim=16, mlp=320, vocab=64)
    return owners(MeshShape.parse(mesh), m)
