"""The seam of activation policies: a policy that only this file knows has the properties of the
others.

The toy policy keeps every second block whole, and runs the blocks between again in backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtron.distributed.mesh_shape import MeshShape
from dtron.layers.recompute import checkpointed
from dtron.mesh import Layout
from dtron.model.activation_bytes import block_bytes
from dtron.model.activation_checkpoint import (
    KEEP_ALL,
    KEEP_INPUT,
    POLICIES,
    ActivationPolicy,
    BlockFunction,
    BlockPolicy,
    every_block,
)
from dtron.model.compute_config import ComputeConfig
from dtron.model.config import ModelConfig
from dtron.runtime.config import PipelineConfig, RunConfig
from dtron.testing import assert_caught, meshes, zero_stages
from dtron.tools.memory_estimate import activation_bytes
from dtron.training.compiled_stage import compiled
from dtron.training.pipeline import program
from dtron.tree import flat
from tests.helpers.examples import KINDS, examples, seen
from tests.helpers.runs import MODEL
from tests.model import test_equivalence
from tests.model.test_activation_memory import kept_by, kept_compiled
from tests.training import test_compiled_stage as test_compiled

NAME = "every_second"


def every_second_block(index: int) -> BlockPolicy:
    return KEEP_INPUT if index % 2 else KEEP_ALL


EVERY_SECOND = ActivationPolicy(NAME, every_second_block)


def recompute_from_another_input(fn: BlockFunction, p: Any, x_TD: Tensor) -> tuple[Tensor, ...]:
    """A mutant: forward is right, and backward runs the block again on another input."""
    runs = []

    def run(p: Any, x_TD: Tensor) -> tuple[Tensor, ...]:
        runs.append(None)
        return fn.run(p, x_TD if len(runs) == 1 else 1.01 * x_TD)

    return checkpointed(run, p, x_TD)


OTHER_INPUT = replace(KEEP_INPUT, run=recompute_from_another_input)
MUTANT = ActivationPolicy(NAME, lambda index: OTHER_INPUT if index % 2 else KEEP_ALL)


@contextmanager
def listed(policy: ActivationPolicy) -> Iterator[None]:
    with mock.patch.dict(POLICIES, {NAME: policy}):
        yield


@pytest.fixture(autouse=True)
def toy():
    with listed(EVERY_SECOND):
        yield


def config(mesh: str, **choices: Any) -> RunConfig:
    choices = {"layers": 2, "batch": 2 * MeshShape.parse(mesh).data, "micro_batch": 2} | choices
    return test_equivalence.model_config(mesh, 2, recompute=NAME, **choices)


@settings(max_examples=examples(1))
@seen(mesh=KINDS, zero=[3, 0, 1, 2], seed=[0])
@given(mesh=meshes(), zero=zero_stages(), seed=st.integers(0, 99))
def test_a_mesh_follows_one_device_that_keeps_all(mesh, zero, seed):
    test_equivalence.assert_same_step(config(mesh, zero=zero, seed=seed))


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_a_pipeline_follows_one_device(schedule):
    """Blocks are counted within a stage. A backward that recomputes is not split."""
    pipeline = PipelineConfig(schedule=schedule)
    test_equivalence.assert_same_step(config("pp=2,dp=2", layers=4, pipeline=pipeline, batch=8))


@pytest.mark.parametrize("mesh", ["dp=1", "dp=2,tp=2"])
def test_another_input_in_recompute_is_caught(mesh):
    with listed(MUTANT):
        assert_caught(lambda: test_equivalence.assert_same_step(config(mesh, zero=3)))


def test_compiled_gradients_are_those_of_eager():
    """The compiled gradients are those of an eager program that keeps everything."""
    torch.compiler.reset()
    model, how = replace(MODEL, layers=3), ComputeConfig(NAME)
    functions = [
        program(model, test_compiled.ONE),
        program(model, test_compiled.ONE, how),
        compiled(program(model, test_compiled.ONE, how), test_compiled.ONE, how, "aot_eager"),
    ]
    (want_loss, want), *others = (test_compiled.step(fns, model) for fns in functions)
    for loss, grads in others:
        assert loss.item() == pytest.approx(want_loss.item(), rel=1e-12)
        for a, b in zip(flat(grads), flat(want), strict=True):
            assert a.abs().max() > 0
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


M = ModelConfig(vocab=32, embed=64, heads=4, kv_heads=2, head_dim=16, mlp=128, context=128)


def kept_eager(recompute: str) -> int:
    return kept_by(replace(M, layers=4), recompute)


def kept_by_a_compiled_stage(recompute: str) -> int:
    return kept_compiled(Layout(), replace(MODEL, layers=2), ComputeConfig(recompute))


def estimated(recompute: str) -> int:
    return activation_bytes(M, MeshShape(), 2**12, POLICIES[recompute], "ring", [4])


def keeps_less_than_all_and_more_than_inputs(kept) -> None:
    least, some, most = (kept(name) for name in ("full", NAME, "none"))
    assert least < some < most


@pytest.mark.parametrize("kept", [kept_eager, kept_by_a_compiled_stage, estimated])
def test_it_keeps_less_than_all_and_more_than_inputs(kept):
    keeps_less_than_all_and_more_than_inputs(kept)


@pytest.mark.parametrize("kept", [kept_eager, estimated])
@pytest.mark.parametrize("same", [KEEP_ALL, KEEP_INPUT])
def test_an_index_that_is_not_heeded_is_caught(kept, same):
    with listed(ActivationPolicy(NAME, every_block(same))):
        assert_caught(lambda: keeps_less_than_all_and_more_than_inputs(kept))


def test_of_two_blocks_it_keeps_one_and_the_input_of_the_other():
    """Exactly, from models of 4 and of 2 blocks. The estimate is the same."""

    def two_blocks(name):
        return kept_by(replace(M, layers=4), name) - kept_by(replace(M, layers=2), name)

    assert 2 * two_blocks(NAME) == two_blocks("none") + two_blocks("full")
    sizes = block_bytes(M, MeshShape(), 256)
    assert [EVERY_SECOND.block(i).kept_bytes(sizes) for i in range(3)] == [
        sizes.all,
        sizes.input,
        sizes.all,
    ]


def test_the_flag_takes_its_name_and_no_other():
    assert ComputeConfig(NAME).policy is EVERY_SECOND
    names = f"none, selective, full, offload, {NAME}"
    with pytest.raises(ValueError, match=f"--recompute no_such_policy: must be one of {names}"):
        ComputeConfig("no_such_policy")
