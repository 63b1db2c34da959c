"""Lab 2: a layer whose loss is right and whose gradient is wrong. The layer is compared with one
device, and the student's test with mutants."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import Partial, Replicate
from torch.distributed.tensor.experimental import local_map

from dtron.course.lab import Lab, Part, Wrong, answer, caught
from dtron.distributed.mesh_shape import MeshShape
from dtron.mesh import Layout
from dtron.testing import LayerCase, assert_equivalent, run_layer

DIMS = {"embed": 6, "mlp": 8}
VISIBLE = ("tp=2", "dp=2", "dp=2,tp=2")
HIDDEN = ("dp_replicate=2", "tp=3", "dp_replicate=2,dp=2,tp=2")
ROWS, COLUMNS = ("tokens_sp", "act_embed"), ("act_embed",)


def on_meshes(meshes: Sequence[str]) -> Callable[[ModuleType], None]:
    """Make a check of the layer on these meshes. The error names the first gradient that differs
    and, on a mesh of one axis, the axis."""

    def check(module: ModuleType) -> None:
        layer, params = answer(module, "layer"), answer(module, "Layer")
        for mesh in meshes:
            try:
                assert_equivalent(layer, params, mesh, sizes(mesh))
            except AssertionError as error:
                axes = tuple(MeshShape.parse(mesh).atoms)
                about_sum = "gradient of scale" in str(error) and len(axes) == 1
                why = f"; look at the sum over {axes[0]}" if about_sum else ""
                raise Wrong(f"{error}{why}") from error
            except RuntimeError as error:
                text = f"a placement does not fit its tensor, and torch says: {error}"
                raise Wrong(f"mesh {mesh}: {text}") from error
            except ValueError as error:
                says, found = re.subn(r"(?s)arg DTensor\(.*\) in local_map", "an input", str(error))
                if not found:
                    raise
                text = f"in_placements do not fit the inputs, and torch says: {says}"
                raise Wrong(f"mesh {mesh}: {text}") from error

    return check


def sizes(mesh: str) -> dict[str, int]:
    """Sizes that tp divides."""
    return {**DIMS, "mlp": 4 * MeshShape.parse(mesh).tp}


def collectives(module: ModuleType) -> None:
    """Compare the collectives of forward and backward with those of a right layer."""
    layer, params = answer(module, "layer"), answer(module, "Layer")
    for mesh in ("tp=2", "dp=2,tp=2"):
        got = run_layer(LayerCase(layer, params, sizes(mesh)), mesh).total
        want = run_layer(LayerCase(right, params, sizes(mesh)), mesh).total
        if got.count != want.count:
            raise Wrong(f"mesh {mesh}: {got}; the layer needs no more and no less than {want}")


def rms(x_TD: Tensor, scale_D: Tensor) -> Tensor:
    return x_TD * (x_TD.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * scale_D


def right(p: Any, x_TD: Tensor, layout: Layout) -> Tensor:
    """The layer, with gradient placements that the layout derives."""
    return _feed_forward(p, layout.local_map(rms, [ROWS, COLUMNS], ROWS)(x_TD, p.scale), layout)


def _feed_forward(p: Any, h_TD: Tensor, layout: Layout) -> Tensor:
    h_TD = layout.constrain(h_TD, "tokens", "act_embed")
    return layout.constrain(F.silu(h_TD @ p.w_up) @ p.w_down, *ROWS)


def summed_over(*axes: str, op: str = "sum") -> Callable[[Any, Tensor, Layout], Tensor]:
    """Make a mutant whose gradient of the scale is a sum over these mesh axes only."""

    def mutant(p: Any, x_TD: Tensor, layout: Layout) -> Tensor:
        if layout.mesh is None:
            return right(p, x_TD, layout)
        rows, columns = list(layout.placements(*ROWS)), list(layout.placements(*COLUMNS))
        scale = [Partial(op) if axis in axes else Replicate() for axis in layout.axes]
        region = local_map(
            rms,
            out_placements=rows,
            in_placements=(rows, columns),
            in_grad_placements=(rows, scale),
            device_mesh=layout.mesh,
        )
        return _feed_forward(p, region(x_TD, p.scale), layout)

    return mutant


def added_by_every_rank(p: Any, x_TD: Tensor, layout: Layout) -> Tensor:
    """A mutant: a bias is added before the sum over tp, so each rank adds it."""
    tokens, pending = ("tokens", "act_embed"), ("tokens", "act_embed", "+mlp")
    h_TD = layout.local_map(rms, [ROWS, COLUMNS], ROWS)(x_TD, p.scale)
    y_TD = F.silu(layout.constrain(h_TD, *tokens) @ p.w_up) @ p.w_down
    y_TD = layout.local_map(lambda y: y + 1e-3, [pending], pending)(y_TD)
    return layout.constrain(y_TD, *ROWS)


MUTANTS = (
    summed_over(),
    summed_over("dp_replicate", "dp"),
    summed_over("tp"),
    summed_over("dp", "tp"),
    summed_over("dp_replicate", "dp", "tp", op="avg"),
    added_by_every_rank,
)


def test_of_the_student(module: ModuleType) -> None:
    caught(answer(module, "check_layer"), [(right,)], [(m,) for m in MUTANTS])


LAB = Lab(
    2,
    "missing_all_reduce",
    (
        Part("the layer", 3, on_meshes(VISIBLE)),
        Part("its collectives", 1, collectives),
        Part("the layer on other meshes", 2, on_meshes(HIDDEN), hidden=True),
        Part("check_layer", 6, test_of_the_student, hidden=True),
    ),
)
