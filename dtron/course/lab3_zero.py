"""Lab 3: ZeRO as a row of the rules. The shards follow from the row; the collectives are counted in
a real step on simulated ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import zip_longest
from types import ModuleType

import torch

from dtron.course.lab import Lab, Part, Wrong, answer
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import simulated
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.config import ModelConfig
from dtron.model.transformer import declare_model
from dtron.params import WeightSpec, init
from dtron.rules import RULES, Rules, place, rules_for
from dtron.tools.count_collectives import CollectiveCounter
from dtron.tools.shard_shapes import local_shape
from dtron.tools.show import rows as weight_rows
from dtron.training.gradients import gradients
from dtron.training.pipeline import one_stage, program
from dtron.tree import flat

KINDS = ("all_gather", "reduce_scatter", "all_reduce")
SENT = {"all_gather": "all-gather", "reduce_scatter": "reduce-scatter", "all_reduce": "all-reduce"}


def model(blocks: int) -> ModelConfig:
    """A small model. Each block has seven weights that ZeRO shards, and two scales."""
    return ModelConfig(
        vocab=32,
        embed=16,
        layers=blocks,
        heads=2,
        kv_heads=2,
        head_dim=8,
        mlp=32,
        vocab_multiple=1,
        tied=False,
    )


def row(meshes: Sequence[str]) -> Callable[[ModuleType], None]:
    """Make a check of ``embed_row``: the shard of every weight on the first rank."""

    def check(module: ModuleType) -> None:
        embed_row = answer(module, "embed_row")
        for mesh in meshes:
            for zero in range(4):
                given = embed_row(zero)
                if not isinstance(given, tuple):
                    raise Wrong(f"zero {zero}: a row is a tuple of mesh axes, and not {given!r}")
                rules: Rules = {**RULES, "embed": given}
                for w in flat(declare_model(model(1))):
                    _compare_shard(w, MeshShape.parse(mesh), zero, rules)

    return check


def _compare_shard(w: WeightSpec, shape: MeshShape, zero: int, rules: Rules) -> None:
    what = f"zero {zero} on {shape}: {w.path} [{', '.join(w.axes)}]"
    axes, sizes = tuple(shape.atoms), tuple(shape.atoms.values())
    try:
        got = place(rules, axes, *w.axes)
    except (TypeError, ValueError) as error:
        raise Wrong(f"{what}: {error}") from error
    want = place(rules_for(zero), axes, *w.axes)
    for axis, g, right in zip_longest(axes, got, want):
        if g != right:
            first = (0,) * len(axes)
            a, b = (local_shape(w.shape, sizes, p, first) for p in (want, got))
            how = "sharded" if right.is_shard() else "not sharded"
            raise Wrong(f"{what} is {how} over {axis}: a rank has {a}, and with your row {b}")


def collectives(cases: Sequence[tuple[int, int]]) -> Callable[[ModuleType], None]:
    """Make a check of ``collectives`` on these numbers of blocks and microbatches."""

    def check(module: ModuleType) -> None:
        predict = answer(module, "collectives")
        for zero in range(4):
            for blocks, microbatches in cases:
                got, want = predict(zero, blocks, microbatches), counted(zero, blocks, microbatches)
                for kind in KINDS:
                    if got.get(kind, 0) != want[kind]:
                        raise Wrong(
                            f"zero {zero}, blocks={blocks}, microbatches={microbatches}: a step "
                            f"has {want[kind]} x {SENT[kind]} over dp, and you say "
                            f"{got.get(kind, 0)}"
                        )

    return check


@cache
def counted(zero: int, blocks: int, microbatches: int) -> Counter[str]:
    """Count the collectives over dp of the gradients of a real step."""
    m = model(blocks)
    with simulated(MeshShape(dp=2)) as mesh, CollectiveCounter(mesh) as counter:
        layout = Layout(mesh, rules_for(zero))
        pipe, functions = one_stage(m, microbatches, layout), program(m, layout)
        params = init(pipe.spec, m.dims(), 0, layout)
        batch = make_batch(torch.zeros(2, 9, dtype=torch.long), layout)
        gradients(functions, params, [batch] * microbatches, 16 * microbatches, pipe, zero)
    return Counter({c.kind: n for c, n in counter.count.items()})


def memory(cases: Sequence[tuple[int, int]]) -> Callable[[ModuleType], None]:
    """Make a check of ``bytes_on_rank`` for ``w_up`` of models of these widths, on these numbers of
    ranks."""

    def check(module: ModuleType) -> None:
        bytes_on_rank = answer(module, "bytes_on_rank")
        for zero in range(4):
            for mlp, ranks in cases:
                m = ModelConfig(layers=1, embed=64, heads=4, kv_heads=4, head_dim=16, mlp=mlp)
                rows = weight_rows(m, MeshShape(dp=ranks), zero)
                (r,) = (r for r in rows if r.path.endswith("w_up"))
                got = tuple(bytes_on_rank(zero, 64 * mlp, ranks))
                for what, g, want in zip_longest(
                    ("weights", "gradients", "optimizer state"),
                    got,
                    (r.params, r.grads, r.optimizer),
                ):
                    if g != want:
                        raise Wrong(
                            f"zero {zero}, a weight of {64 * mlp} elements on {ranks} ranks: a "
                            f"rank keeps {want} bytes of {what}, and you say {g}"
                        )

    return check


LAB = Lab(
    3,
    "zero",
    (
        Part("embed_row", 3, row(("dp=2", "cp=2", "dp=2,tp=2"))),
        Part("collectives", 3, collectives(((1, 1), (1, 2)))),
        Part("bytes_on_rank", 3, memory(((128, 2), (128, 4)))),
        Part("embed_row, other meshes", 1, row(("dp_replicate=2", "dp=2,cp=2,tp=2")), hidden=True),
        Part("collectives, other sizes", 1, collectives(((2, 3),)), hidden=True),
        Part("bytes_on_rank, other sizes", 1, memory(((256, 8), (192, 16))), hidden=True),
    ),
)
