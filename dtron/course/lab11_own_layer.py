"""Lab 11: a layer of your own. The student's layer is compared with its definition on one device,
then on many meshes with one device. The student's test of such layers has to catch mutants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from traceback import extract_tb
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from dtron.course.lab import Lab, Part, Wrong, answer, caught
from dtron.course.lab11_layers import MUTANTS, RIGHT, Weights, definition
from dtron.distributed.collectives import AxisGroup
from dtron.distributed.mesh_shape import MeshShape
from dtron.mesh import Layout
from dtron.params import declare
from dtron.rules import RULES, place
from dtron.testing import Axes, Outcome, assert_equivalent, run_layer
from dtron.testing import LayerCase as Case
from dtron.tools.count_collectives import Collective, HiddenCommunication
from dtron.tools.shard_shapes import local_shape
from dtron.tree import flat

TOKENS = 24
DIMS = {"embed": 6, "mlp": 12, "layers": 1}
INPUTS: dict[str, Axes] = {"x": ("tokens_sp", "act_embed"), "first": ("tokens",)}
OUT: Axes = ("tokens_sp", "act_embed")
MESH = MeshShape(dp=2, tp=2)  # for shards of weights


def first_tokens(mesh: str, documents: Sequence[int]) -> Callable[[object], Tensor]:
    """Make a function that returns whether a token is the first of its document. Each data rank of
    the mesh has one row, and a row begins with a document.

    ``documents``: where further documents begin."""

    def make(generator: object) -> Tensor:
        first_T = torch.zeros(TOKENS, dtype=torch.bool)
        first_T[:: TOKENS // MeshShape.parse(mesh).data] = True
        first_T[list(documents)] = True
        return first_T

    return make


def weights(module: ModuleType) -> None:
    """Compare the declared weights: their names, and the logical axes of each."""
    given = answer(module, "Weights")
    want = {w.path: w for w in flat(declare(Weights, DIMS))}
    try:
        got = {w.path: w for w in flat(declare(given, DIMS))}
    except (KeyError, ValueError) as error:
        raise Wrong(f"{error}; the axis of D is embed, and the axis of F is mlp") from error
    for name, w in want.items():
        if name not in got:
            raise Wrong(f"Weights has no {name}; declare it: {name} = weight(...)")
        if (axes := got[name].axes) != w.axes:
            try:
                shards = [_shard(x.shape, *x.axes) for x in (w, got[name])]
            except ValueError as error:
                raise Wrong(f"{name}: {error}") from error
            raise Wrong(
                f"{name} has the axes {_text(axes)}, not {_text(w.axes)}: on {MESH} a rank of "
                f"ZeRO-3 has {shards[0]}, and with yours {shards[1]}"
            )
    if more := got.keys() - want:
        raise Wrong(f"Weights has {min(more)} too; the layer has three weights")


def _text(axes: Axes) -> str:
    return ", ".join(map(str, axes))


def _shard(shape: tuple[int, ...], *axes: str | None) -> tuple[int, ...]:
    placements = place(RULES, tuple(MESH.atoms), *axes)
    return local_shape(shape, tuple(MESH.atoms.values()), placements, (0, 0))


def one_device(documents: Sequence[int]) -> Callable[[ModuleType], None]:
    """Make a check of the layer on one device against its definition."""

    def check(module: ModuleType) -> None:
        case = Case(answer(module, "layer"), answer(module, "Weights"), DIMS, INPUTS, OUT, TOKENS)
        values, first_T = case.values(), first_tokens("dp=1", documents)(None)
        p = case.weights(declare(case.params, DIMS))
        want = definition(p, values["x"], first_T)
        got = case.fn(p, values["x"], first_T, Layout())
        if got.shape != want.shape:
            raise Wrong(
                f"one device: the output has the shape {tuple(got.shape)}, not {tuple(want.shape)}"
            )
        wrong = (got - want).abs().amax(1) > 1e-9
        if wrong.any():
            t = int(wrong.nonzero()[0])
            what = "the first token of its document" if first_T[t] else "inside its document"
            raise Wrong(
                f"one device: token {t}, {what}, is wrong by {(got - want)[t].abs().max():.1e}; "
                f"{int(wrong.sum())} of {TOKENS} tokens are"
            )

    return check


Place = tuple[str, int, tuple[int, ...]]  # mesh, ZeRO stage, where further documents begin
VISIBLE: tuple[Place, ...] = (
    ("tp=2", 1, (5,)),
    ("dp=2,tp=2", 1, (5,)),
    ("cp=2", 1, (5,)),
)
HIDDEN: tuple[Place, ...] = (
    ("cp=3", 1, (16, 19)),  # a document begins with the first token of a rank, and not of another
    ("cp=4,tp=2", 3, (12, 13)),
    ("dp=2,cp=2", 0, (7, 18)),
    ("dp_replicate=2,tp=3", 2, (23,)),
)


def meshes(places: Sequence[Place]) -> Callable[[ModuleType], None]:
    """Make a check of the layer on meshes: output and gradients, each compared with one device."""

    def check(module: ModuleType) -> None:
        for mesh, zero, documents in places:
            on_mesh(module, mesh, zero, documents)

    return check


class SameOnAllRanks:
    """The ranks along an axis, without the place of this rank. On simulated ranks the place has
    many values, and a comparison with it says no more than that they differ."""

    def __init__(self, group: AxisGroup):
        self.ranks, self.args = group.ranks, group.args

    @property
    def place(self) -> int:
        raise Wrong(
            "the layer asks for the place of a rank; if some ranks do not call ring_shift, the "
            "others wait forever; call it on every rank, and mask by first_T"
        )


def without_places(layout: Layout) -> Layout:
    """Hide the place of a rank from a layer."""
    for axis, group in layout.groups.items():
        layout.groups[axis] = cast(AxisGroup, SameOnAllRanks(group))
    return layout


def on_mesh(module: ModuleType, mesh: str, zero: int, documents: Sequence[int]) -> Outcome:
    """Compare the student's layer on a mesh with one device. Raises Wrong with the first tensor."""
    options: dict[str, Any] = {
        "inputs": INPUTS,
        "out": OUT,
        "tokens": TOKENS,
        "zero": zero,
        "make": {"first": first_tokens(mesh, documents)},
    }
    where = f"ZeRO-{zero}, documents begin at {', '.join(map(str, documents))}"
    try:
        return assert_equivalent(
            answer(module, "layer"),
            answer(module, "Weights"),
            mesh,
            DIMS,
            mutate=without_places,
            **options,
        )
    except HiddenCommunication as error:
        assert error.__cause__ is not None  # torch's error, in the student's line
        inner = extract_tb(error.__cause__.__traceback__)
        frames = [f for f in inner if f.filename == module.__file__]
        raise Wrong(
            f"mesh {mesh}: line {frames[-1].lineno} ({frames[-1].line}) works on shards as if they "
            "were whole; put it into a local region, or constrain its operands"
        ) from error
    except AssertionError as error:
        why = "; a sum over tp is still pending" if "(Partial" in str(error) else ""
        if ": output differs" in str(error):
            case = Case(module.layer, module.Weights, DIMS, **options)
            got, want = (run_layer(case, m).tensors["output"] for m in (mesh, "dp=1"))
            wrong = ((got - want).abs().amax(1) > 1e-9).nonzero().flatten().tolist()
            why = f"; {len(wrong)} of {TOKENS} tokens are wrong, and token {wrong[0]} is the first"
        raise Wrong(f"{error}{why} ({where})") from error


def collectives(module: ModuleType) -> None:
    """Count the collectives of the forward."""
    mesh = "cp=2,tp=2"
    count = on_mesh(module, mesh, 1, (5,)).forward.count
    if n := sum(n for c, n in count.items() if c.axis == "cp" and c.kind == "all_gather"):
        raise Wrong(
            f"{mesh}: {n} x all-gather over cp; the last token of the previous rank is enough"
        )
    want = Counter(
        {
            Collective("all_gather", "tp"): 1,
            Collective("all_to_all", "cp"): 1,
            Collective("reduce_scatter", "tp"): 1,
        }
    )
    for c in sorted({*want, *count}, key=str):
        if count[c] != want[c]:
            what = "ring_shift" if c.kind == "all_to_all" else c.kind.replace("_", "-")
            raise Wrong(f"{mesh}: forward has {count[c]} x {what} over {c.axis}, not {want[c]}")


def test_of_the_student(module: ModuleType) -> None:
    test = answer(module, "check_layer")
    caught(test, [(f, Weights) for f in RIGHT], [(f, Weights) for f in MUTANTS])


LAB = Lab(
    11,
    "own_layer",
    (
        Part("the weights", 2, weights),
        Part("one device", 2, one_device((5, 6, 13))),
        Part("the layer", 4, meshes(VISIBLE)),
        Part("the collectives", 1, collectives),
        Part("other meshes", 4, meshes(HIDDEN), hidden=True),
        Part("check_layer", 6, test_of_the_student, hidden=True),
    ),
)
