"""The seam of FP8 recipes: a recipe that only this file knows has the properties of the others.

The toy recipe rounds both operands of a matmul to bfloat16. A value rounds alike on every rank, so
a mesh gives one device's step to float64's precision. One of the library's recipes has the same
properties, to float32's precision: its sizes are multiples, its casts are tuples, and its matmuls
are emulated in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtron.distributed.mesh_shape import MeshShape
from dtron.fp8.__main__ import error
from dtron.fp8.grouped_mm import masked
from dtron.fp8.recipe import Recipe, Role
from dtron.fp8.recipes import RECIPES
from dtron.model.compute_config import ComputeConfig
from dtron.runtime.config import PipelineConfig, RunConfig
from dtron.runtime.validate import check_capability, check_fp8
from dtron.testing import assert_caught, meshes, zero_stages
from dtron.tools.compare_steps import compare
from dtron.tools.verify import on_one_device
from dtron.tools.verify_step import one_step
from tests.fp8 import test_matmul as test_fp8
from tests.fp8 import test_training as test_fp8_training
from tests.helpers.examples import KINDS, examples, seen
from tests.model import test_equivalence
from tests.moe import test_moe_models

NAME = "bfloat16_operands"


@dataclass(frozen=True)
class Bfloat16Operands(Recipe):
    """Operands rounded to bfloat16 and multiplied in the dtype that they came in."""

    multiple = 1

    def cast(self, x: Tensor, dim: int, role: Role) -> Tensor:
        return x.bfloat16().to(x.dtype)

    def mm(self, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        return (a @ b).to(dtype)

    def grouped_mm(self, x: Tensor, w: Tensor, ends_E: Tensor) -> Tensor:
        return masked(self.cast(x, 1, "input"), self.cast(w, 1, "weight"), ends_E)


TOLERANCES = {
    NAME: (Bfloat16Operands(NAME), 1e-9),
    # In float32. Seldom a value rounds to the neighbouring FP8 value on the mesh.
    "rowwise": (RECIPES["rowwise"], 1e-2),
}


@pytest.fixture(autouse=True)
def toy() -> Iterator[None]:
    with mock.patch.dict(RECIPES, {name: recipe for name, (recipe, _) in TOLERANCES.items()}):
        yield


each_recipe = pytest.mark.parametrize("name", TOLERANCES)

Change = Callable[[Tensor, Role], Tensor]


def coarse_weights(x: Tensor, role: Role) -> Tensor:
    """A mutant: weights lose bits before they are cast."""
    weighs = role in ("weight", "weight_for_grad_input")
    return x.to(torch.float8_e5m2).to(x.dtype) if weighs else x


def scaled_by_largest(x: Tensor, role: Role) -> Tensor:
    """A mutant: a scale that is no power of two, and that depends on the rank's shard."""
    largest = x.abs().amax() if x.numel() else 1.0
    return (x / largest).to(torch.float8_e5m2).to(x.dtype) * largest


@contextmanager
def changed(name: str, change: Change | None) -> Iterator[None]:
    """The recipe, whose operands are changed before they are cast."""
    kind = type(RECIPES[name])
    cast, grouped_mm = kind.cast, kind.grouped_mm

    def cast_changed(self: Recipe, x: Tensor, dim: int, role: Role) -> Any:
        return cast(self, change(x, role), dim, role)

    def grouped_changed(self: Recipe, x: Tensor, w: Tensor, ends_E: Tensor) -> Tensor:
        return grouped_mm(self, change(x, "input"), change(w, "weight"), ends_E)

    changes = {} if change is None else {"cast": cast_changed, "grouped_mm": grouped_changed}
    with mock.patch.multiple(kind, **changes) if changes else nullcontext():
        yield


def rounded_up(name: str, size: int, parts: int = 1) -> int:
    """The size, or the next one whose ``parts`` are multiples that the recipe converts."""
    unit = RECIPES[name].multiple * parts
    return -(-size // unit) * unit


def in_fp8(config: RunConfig, name: str) -> RunConfig:
    """The run under the recipe, with sizes that the recipe converts on one rank."""
    m, mesh, fit = config.model, MeshShape.parse(config.mesh), partial(rounded_up, name)
    moe = replace(m.moe, mlp=fit(m.moe.mlp, mesh.etp), shared=fit(m.moe.shared, mesh.tp))
    sizes = dict(embed=fit(m.embed), head_dim=fit(m.head_dim), mlp=fit(m.mlp, mesh.tp))
    return replace(
        config,
        model=replace(m, **sizes, context=fit(m.context), moe=moe),
        data=replace(config.data, seq_len=fit(config.data.seq_len)),
        fp8=name,
        fp8_first_last=True,
        fp8_min_weights=0,
    )


def follows(
    config: RunConfig, name: str, alone: Change | None = None, together: Change | None = None
) -> None:
    """Assert that a step on the config's mesh is one device's step: loss, gradients, weights and
    moments.

    ``alone``, ``together``: mutants on one device, and on the mesh."""
    config = in_fp8(config, name)
    with changed(name, alone):
        want = one_step(replace(on_one_device(config), recompute="none"), MeshShape())
    with changed(name, together):
        got = one_step(config, MeshShape.parse(config.mesh))
    loss, rows = compare(want, got)
    tolerance = TOLERANCES[name][1]
    off = [row for row in rows if not row.within(tolerance)]
    assert loss <= tolerance and not off, (loss, off)


def dense(mesh: str, **choices: Any) -> RunConfig:
    data = MeshShape.parse(mesh).data
    return test_equivalence.model_config(mesh, 2, batch=2 * data, micro_batch=2, **choices)


@each_recipe
@pytest.mark.parametrize("mesh", test_fp8.CUTS)
def test_a_sharded_product_is_that_of_one_device(mesh, name):
    got, counter = test_fp8.on_mesh(name, mesh)
    assert not counter.count
    want = test_fp8.one_device(name)
    assert all(error(a, b) < 1e-4 for a, b in zip(got, want, strict=True))


@each_recipe
@settings(max_examples=examples(1))
@seen(mesh=KINDS, zero=[3, 0, 1, 2], recompute=["none", "selective", "full"], seed=[0])
@given(
    mesh=meshes(),
    zero=zero_stages(),
    recompute=st.sampled_from(["none", "selective", "full"]),
    seed=st.integers(0, 99),
)
def test_a_mesh_follows_one_device(name, mesh, zero, recompute, seed):
    config = dense(mesh, zero=zero, recompute=recompute, seed=seed, activation="swiglu")
    follows(config, name)


@each_recipe
@pytest.mark.parametrize(
    ("mesh", "choices"),
    [
        ("dp=2,ep=2", {"moe_dispatch": "alltoall", "balanced": True}),
        ("dp=2,tp=2,ep=4", {"moe_dispatch": "allgather", "zero": 3, "shared": 4}),
        ("dp=2,tp=2,ep=2,etp=2", {"moe_dispatch": "static", "zero": 3}),
    ],
)
def test_experts_follow_one_device(mesh, choices, name):
    follows(test_moe_models.model_config(mesh, **choices), name)


@each_recipe
def test_a_split_backward_follows_one_device(name):
    """Under ZB-H1: an opaque function computes both gradients at once."""
    follows(dense("pp=2,tp=2", layers=2, pipeline=PipelineConfig(schedule="zb-h1")), name)


@each_recipe
@pytest.mark.parametrize(
    "config",
    [dense("dp=2,tp=2"), test_moe_models.model_config("dp=2,ep=2", moe_dispatch="allgather")],
)
def test_mutants_are_caught(config, name):
    """Caught: weights are rounded otherwise on the mesh, or a shard has a scale of its own that is
    no power of two."""
    follows(config, name)
    assert_caught(lambda: follows(config, name, together=coarse_weights))
    assert_caught(lambda: follows(config, name, scaled_by_largest, scaled_by_largest))


@each_recipe
def test_it_is_in_force(name):
    """Otherwise the tests above would compare a step in high precision with itself."""
    config = in_fp8(dense("dp=1"), name)
    plain, rounded = (one_step(c, MeshShape()) for c in (replace(config, fp8="none"), config))
    assert any(row.grad > 1e-4 for row in compare(plain, rounded)[1])


def test_compiled_gradients_are_those_of_eager():
    """Those of the library's recipes: fp8/test_training.py."""
    fit, block = partial(rounded_up, NAME), test_fp8_training.BLOCK
    sizes = dict(embed=fit(32), head_dim=fit(8), mlp=fit(64), context=fit(block.context))
    tokens = torch.arange(4 * (fit(16) + 1)).view(4, -1) % 61
    wide = {"BLOCK": replace(block, **sizes), "TOKENS": tokens}
    with mock.patch.multiple(test_fp8_training, **wide):
        test_fp8_training.test_compiled_gradients_are_those_of_eager(NAME, "full")


# ---- about the example alone


def test_what_the_recipe_says_is_heeded():
    with pytest.raises(ValueError, match=f"--fp8-gather --fp8 {NAME}.*drop --fp8-gather"):
        ComputeConfig(fp8=NAME, fp8_gather=True)
    config = in_fp8(dense("dp=1"), NAME)
    check = partial(check_fp8, config.how, config.model, MeshShape(), 7, torch.bfloat16)
    gpu = {"get_device_capability": lambda _: (8, 0), "get_device_name": lambda _: "Old GPU"}
    with mock.patch.multiple(torch.cuda, **gpu):
        with pytest.raises(ValueError, match="Old GPU has compute capability 8.0.*8.9; drop --fp8"):
            check_capability(config.how, "cuda")
        with mock.patch.object(Bfloat16Operands, "capability", (8, 0)):
            check_capability(config.how, "cuda")
    check_capability(config.how, "cpu")
    check()
    with (
        mock.patch.object(Bfloat16Operands, "multiple", 16),
        pytest.raises(ValueError, match="the 7 tokens multiples of 16"),
    ):
        check()
