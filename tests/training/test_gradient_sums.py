"""Gradients of later microbatches are added to sums of another dtype."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtron.mesh import Layout
from dtron.training.compiled_stage import CompiledStage
from dtron.training.compiled_units import CompiledUnits
from dtron.training.gradients import EagerWeights
from dtron.training.traced_function import GraphCompiler
from tests.helpers.examples import examples

SHAPES = st.lists(st.sampled_from([(12,), (4, 6), (6, 4), (24,)]), min_size=1, max_size=4)


def compiled() -> CompiledStage:
    compiler = GraphCompiler("aot_eager")
    return CompiledStage(cast(Any, None), Layout(), CompiledUnits(None, compiler), compiler)


@pytest.fixture(scope="module")
def stage() -> CompiledStage:
    return compiled()


@settings(max_examples=examples(20))
@given(shapes=SHAPES, turned=st.booleans(), same=st.booleans(), seed=st.integers(0, 99))
def test_compiled_sums_are_those_of_torch(stage, shapes, turned, same, seed):
    """Any shapes, dtypes and memory orders, in one list."""
    torch.manual_seed(seed)
    dtype = torch.float32 if same else torch.bfloat16
    grads = [torch.randn(shape).to(dtype) for shape in shapes]
    sums = [torch.randn(shape) for shape in shapes]
    if turned:
        sums[0], grads[0] = (x.mT if x.ndim > 1 else x for x in (sums[0], grads[0]))
    want = [s + g for s, g in zip(sums, grads, strict=True)]
    plain: list[Tensor] = [s.clone() for s in sums]
    EagerWeights(Layout()).accumulate(plain, grads)
    stage.accumulate(sums, grads)
    for x, eager, y in zip(sums, plain, want, strict=True):
        assert torch.equal(x, y) and torch.equal(eager, y)


def test_nothing_to_add(stage):
    stage.accumulate([], [])
    EagerWeights(Layout()).accumulate([], [])


def test_a_size_is_compiled_once():
    """Shapes of one number of elements share a kernel."""
    stage = compiled()
    for shape in ((4, 6), (6, 4), (24,), (4, 6)):
        stage.accumulate([torch.zeros(shape)], [torch.ones(shape, dtype=torch.bfloat16)])
    assert len(stage._add.kinds) == 1
