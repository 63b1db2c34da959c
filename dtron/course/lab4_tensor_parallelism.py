"""Lab 4: tensor and sequence parallelism by hand. The student's layers are compared with one
device, and their collectives are counted, in forward and in backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from dtron.course.lab import Lab, Part, Wrong, answer
from dtron.distributed.mesh_shape import MeshShape
from dtron.testing import Axes, LayerCase, Outcome, assert_equivalent, run_layer
from dtron.tools.count_collectives import Collective, HiddenCommunication

RESIDUAL: dict[str, Axes] = {
    "tensor_parallel": ("tokens", "act_embed"),
    "sequence_parallel": ("tokens_sp", "act_embed"),
}
# Collectives over tp: of forward, and of backward with the end of the step. Under sequence
# parallelism the gradient of the bias is a sum over tp.
COLLECTIVES: dict[str, tuple[Counter[str], Counter[str]]] = {
    "tensor_parallel": (Counter(all_reduce=1), Counter(all_reduce=1)),
    "sequence_parallel": (
        Counter(all_gather=1, reduce_scatter=1),
        Counter(all_gather=1, reduce_scatter=1, all_reduce=1),
    ),
}
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
TOKENS, ELEMENT = 24, 8  # float64


def dims(mesh: str) -> dict[str, int]:
    """Sizes that tp divides."""
    return {"embed": 6, "mlp": 4 * MeshShape.parse(mesh).tp}


def case(module: ModuleType, name: str, mesh: str) -> LayerCase:
    """Return the student's layer with its inputs."""
    layer, params = answer(module, name), answer(module, "Weights")
    return LayerCase(layer, params, dims(mesh), {"x": RESIDUAL[name]}, tokens=TOKENS)


def equivalent(name: str, meshes: Sequence[str]) -> Callable[[ModuleType], None]:
    """Make a check of a layer: its values on these meshes, and its collectives on the first."""

    def check(module: ModuleType) -> None:
        for mesh in meshes:
            c = case(module, name, mesh)
            options: dict[str, Any] = {"inputs": c.inputs, "tokens": c.tokens}
            try:
                assert_equivalent(c.fn, c.params, mesh, c.dims, **options)
            except AssertionError as error:
                pending = (
                    "; a sum over tp is still pending"
                    if "has placements (Partial" in str(error)
                    else ""
                )
                raise Wrong(f"{error}{pending}") from error
            except HiddenCommunication as error:
                line = str(error).partition(", in ")[0]
                why = "a collective over tp is missing before this line; constrain its operands"
                raise Wrong(f"mesh {mesh}: {line}: {why}") from error
        _compare_collectives(name, meshes[0], run_layer(case(module, name, meshes[0]), meshes[0]))

    return check


def _compare_collectives(name: str, mesh: str, got: Outcome) -> None:
    forward = got.forward.count
    for when, counts, want in (
        ("forward", forward, COLLECTIVES[name][0]),
        ("backward", got.total.count - forward, COLLECTIVES[name][1]),
    ):
        for kind in KINDS:
            n = counts[Collective(kind, "tp")]
            if n != want[kind]:
                what = kind.replace("_", "-")
                line = f"{when} on {mesh} has {n} x {what} over tp, not {want[kind]}"
                missing_f = name == "tensor_parallel" and when == "backward" and not n
                raise Wrong(f"{line}; f sums the gradient of x_TD" if missing_f else line)


def messages(module: ModuleType) -> None:
    """Compare the bytes that a rank sends in forward with the bytes of the counted collectives."""
    _compare_bytes(module, "sent", "sends", _sent)


def residual(module: ModuleType) -> None:
    """Compare the bytes of the residual stream on a rank."""
    _compare_bytes(module, "kept", "keeps", _kept)


def _compare_bytes(
    module: ModuleType, name: str, verb: str, right: Callable[[str, int, int, int], float]
) -> None:
    arithmetic = answer(module, name)
    for tp, tokens, width in ((2, 24, 6), (4, 32, 10), (8, 4096, 1024)):
        got = arithmetic(tokens, width, tp, ELEMENT)
        for kind, g in zip(RESIDUAL, got, strict=True):
            want = right(kind, tokens * width * ELEMENT, tp, 0)
            if g != want:
                raise Wrong(
                    f"{tokens} tokens of {width} numbers of {ELEMENT} bytes on tp={tp}: a rank "
                    f"{verb} {want:g} bytes under {kind}, and you say {g:g}"
                )


def _sent(kind: str, whole: int, tp: int, when: int) -> float:
    """A ring sends (n - 1) / n of the bytes, and an all-reduce twice as much."""
    rounds = {c: 2 if c == "all_reduce" else 1 for c in KINDS}
    return sum(n * rounds[c] * whole * (tp - 1) / tp for c, n in COLLECTIVES[kind][when].items())


def _kept(kind: str, whole: int, tp: int, when: int) -> float:
    return whole / tp if "tokens_sp" in RESIDUAL[kind] else whole


LAB = Lab(
    4,
    "tensor_parallelism",
    (
        Part("tensor_parallel", 3, equivalent("tensor_parallel", ("tp=2", "dp=2,tp=2"))),
        Part("sequence_parallel", 3, equivalent("sequence_parallel", ("tp=2", "dp=2,tp=2"))),
        Part("sent", 2, messages),
        Part("kept", 1, residual),
        Part(
            "tensor_parallel, other meshes",
            1,
            equivalent("tensor_parallel", ("tp=3", "dp_replicate=2,tp=2")),
            hidden=True,
        ),
        Part(
            "sequence_parallel, other meshes",
            2,
            equivalent("sequence_parallel", ("tp=3", "dp_replicate=2,tp=2")),
            hidden=True,
        ),
    ),
)
