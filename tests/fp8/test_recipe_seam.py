"""The seam of FP8 recipes: a recipe that only this file knows has the properties of the others.

The toy recipe rounds both operands of a matmul to bfloat16. A value rounds alike on every rank, so
a mesh gives one device's step to float64's precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
from dtron.runtime.validate import check_fp8
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


class OneOperandRounded(Bfloat16Operands):
    """A mutant: weights stay as they are."""

    def cast(self, x: Tensor, dim: int, role: Role) -> Tensor:
        stays = role in ("weight", "weight_for_grad_input")
        return x if stays else super().cast(x, dim, role)


class ScaledByLargest(Bfloat16Operands):
    """A mutant: a scale that is no power of two, and that depends on the rank's shard."""

    def cast(self, x: Tensor, dim: int, role: Role) -> Tensor:
        largest = x.abs().amax() if x.numel() else 1.0
        return super().cast(x / largest, dim, role) * largest


@contextmanager
def listed(kind: type[Recipe]) -> Iterator[None]:
    with mock.patch.dict(RECIPES, {NAME: kind(NAME)}):
        yield


@pytest.fixture(autouse=True)
def toy():
    with listed(Bfloat16Operands):
        yield


def in_fp8(config: RunConfig) -> RunConfig:
    return replace(config, fp8=NAME, fp8_first_last=True, fp8_min_weights=0)


def follows(
    config: RunConfig,
    alone: type[Recipe] = Bfloat16Operands,
    together: type[Recipe] = Bfloat16Operands,
) -> None:
    """Assert that a step on the config's mesh, under the recipe ``together``, is one device's step
    under the recipe ``alone``: loss, gradients, weights and moments."""
    config = in_fp8(config)
    with listed(alone):
        want = one_step(replace(on_one_device(config), recompute="none"), MeshShape())
    with listed(together):
        got = one_step(config, MeshShape.parse(config.mesh))
    loss, rows = compare(want, got)
    assert loss <= 1e-9 and all(row.same for row in rows), (loss, [r for r in rows if not r.same])


def dense(mesh: str, **choices: Any) -> RunConfig:
    data = MeshShape.parse(mesh).data
    return test_equivalence.model_config(mesh, 2, batch=2 * data, micro_batch=2, **choices)


@pytest.mark.parametrize("mesh", test_fp8.CUTS)
def test_a_sharded_product_is_that_of_one_device(mesh):
    got, counter = test_fp8.on_mesh(NAME, mesh)
    assert not counter.count
    want = test_fp8.one_device(NAME)
    assert all(error(a, b) < 1e-6 for a, b in zip(got, want, strict=True))


@settings(max_examples=examples(1))
@seen(mesh=KINDS, zero=[3, 0, 1, 2], recompute=["none", "selective", "full"], seed=[0])
@given(
    mesh=meshes(),
    zero=zero_stages(),
    recompute=st.sampled_from(["none", "selective", "full"]),
    seed=st.integers(0, 99),
)
def test_a_mesh_follows_one_device(mesh, zero, recompute, seed):
    follows(dense(mesh, zero=zero, recompute=recompute, seed=seed, activation="swiglu"))


@pytest.mark.parametrize(
    ("mesh", "choices"),
    [
        ("dp=2,ep=2", {"moe_dispatch": "alltoall", "balanced": True}),
        ("dp=2,tp=2,ep=4", {"moe_dispatch": "allgather", "zero": 3, "shared": 4}),
        ("dp=2,tp=2,ep=2,etp=2", {"moe_dispatch": "static", "zero": 3}),
    ],
)
def test_experts_follow_one_device(mesh, choices):
    follows(test_moe_models.model_config(mesh, **choices))


def test_a_split_backward_follows_one_device():
    """Under ZB-H1: an opaque function computes both gradients at once."""
    follows(dense("pp=2,tp=2", layers=2, pipeline=PipelineConfig(schedule="zb-h1")))


@pytest.mark.parametrize(
    "config",
    [dense("dp=2,tp=2"), test_moe_models.model_config("dp=2,ep=2", moe_dispatch="allgather")],
)
@pytest.mark.parametrize(
    ("alone", "together"),
    [(Bfloat16Operands, OneOperandRounded), (ScaledByLargest, ScaledByLargest)],
)
def test_mutants_are_caught(config, alone, together):
    """Caught: one operand alone is rounded on the mesh, or a shard has a scale of its own that is
    no power of two."""
    follows(config)
    assert_caught(lambda: follows(config, alone, together))


def test_it_is_in_force():
    """Otherwise the tests above would compare a step in high precision with itself."""
    config = dense("dp=1")
    plain, rounded = (one_step(c, MeshShape()) for c in (config, in_fp8(config)))
    assert any(row.grad > 1e-4 for row in compare(plain, rounded)[1])


def test_compiled_gradients_are_those_of_eager():
    test_fp8_training.test_compiled_gradients_are_those_of_eager(NAME, "full")


def test_what_the_recipe_says_is_heeded():
    with pytest.raises(ValueError, match=f"--fp8-gather --fp8 {NAME}.*drop --fp8-gather"):
        ComputeConfig(fp8=NAME, fp8_gather=True)
    config = in_fp8(dense("dp=1"))
    check = partial(check_fp8, config.how, config.model, MeshShape(), 7, compute=torch.bfloat16)
    gpu = {"get_device_capability": lambda _: (8, 0), "get_device_name": lambda _: "Old GPU"}
    with mock.patch.multiple(torch.cuda, **gpu):
        with pytest.raises(ValueError, match="Old GPU has compute capability 8.0.*8.9; drop --fp8"):
            check(device="cuda")
        with mock.patch.object(Bfloat16Operands, "capability", (8, 0)):
            check(device="cuda")
    check(device="cpu")
    with (
        mock.patch.object(Bfloat16Operands, "multiple", 16),
        pytest.raises(ValueError, match="the 7 tokens multiples of 16"),
    ):
        check(device="cpu")
