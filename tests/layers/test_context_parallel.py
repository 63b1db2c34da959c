"""Context parallelism: a step on ranks with shards of sequences is the step of one device.

Every piece of it has a mutant."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtron.distributed import collectives
from dtron.distributed.mesh_shape import MeshShape
from dtron.layers import ring_attention
from dtron.layers.attention_kernels import attention_and_lse
from dtron.layers.context_parallel import ContextParallelMask
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.runtime.config import DataConfig, RunConfig
from dtron.runtime.validate import sequence_unit
from dtron.testing import assert_caught, meshes
from dtron.tools import verify_step
from dtron.tools.compare_steps import StepResult
from dtron.tools.verify import on_one_device
from dtron.tools.verify_step import one_step
from tests.helpers.examples import examples
from tests.helpers.same_step import assert_same_result, model_config

METHODS = ("ring", "allgather", "ulysses")


def configured(
    mesh: str, method: str = "ring", group: int = 2, kv: int = 1, **choices
) -> RunConfig:
    """A run with ``kv`` key heads per rank; under ulysses times cp."""
    shape = MeshShape.parse(mesh)
    heads = kv * shape.tp * (shape.cp if method == "ulysses" else 1)
    documents = choices.pop("documents", False)
    seq_len = sequence_unit(shape, zigzag=True) * math.ceil(12 / sequence_unit(shape, zigzag=True))
    choices = (
        dict(
            heads=heads * group, kv_heads=heads, context=64, batch=2 * shape.data, cp_method=method
        )
        | choices
    )
    data = DataConfig(seq_len=seq_len, document_mask=documents)
    return replace(model_config(mesh, 1, **choices), data=data)


def assert_same_step(config: RunConfig, mutate=lambda layout: layout) -> StepResult:
    alone = replace(on_one_device(config), recompute="none", micro_batch=None)
    want = one_step(alone, MeshShape())
    got = one_step(config, MeshShape.parse(config.mesh), mutate)
    assert_same_result(want, got)
    return got


CHOICES = dict(
    mesh=meshes(8, ("dp", "cp", "tp")).filter(lambda mesh: "cp" in mesh),
    method=st.sampled_from(METHODS),
    zigzag=st.sampled_from(["on", "off"]),
    documents=st.booleans(),
    group=st.sampled_from([1, 2, 3]),
    kv=st.sampled_from([1, 2]),
    window=st.sampled_from([None, None, 3, 7]),
    sinks=st.booleans(),
    softcap=st.sampled_from([None, None, 2.0]),
    attention_kernel=st.sampled_from(["auto", "reference"]),
    zero=st.sampled_from([0, 1, 2, 3]),
    recompute=st.sampled_from(["none", "selective", "full"]),
    seed=st.integers(0, 99),
    learned=st.booleans(),
)

FEW = {**CHOICES, "mesh": meshes(6, ("dp", "cp", "tp")).filter(lambda mesh: "cp" in mesh)}


def one_case(mesh, learned, **choices):
    choices |= {"positions": "learned"} if learned else {}
    assert_same_step(configured(mesh, **choices))


test_a_step_is_that_of_one_device = settings(max_examples=examples(2))(given(**FEW)(one_case))
test_many_steps_are_those_of_one_device = pytest.mark.slow(
    settings(max_examples=100)(given(**CHOICES)(one_case))
)


@pytest.mark.parametrize("zigzag", ["on", "off"])
def test_the_fused_ring_on_three_ranks(zigzag):
    """With two ranks no chunk is passed on twice, and no rank is between others."""
    assert_same_step(configured("cp=3", zigzag=zigzag))


def test_with_a_pipeline():
    assert_same_step(
        configured("pp=2,cp=2", layers=2, batch=4, micro_batch=1, zero=3, documents=True)
    )


# ---- mutants


def changed(name: str, **places):
    """Batches on the mesh have the field ``name`` in contiguous order."""
    make = make_batch

    def wrong(rows, layout, *others, **choices):
        batch = make(rows, layout, *others, **choices)
        if layout.mesh is None:
            return batch
        contiguous = make(rows, layout, *others, **{**choices, "zigzag": False})
        return replace(batch, **{name: getattr(contiguous, name)})

    return mock.patch.object(verify_step, "make_batch", wrong)


def merged_without_rescaling(a, b):
    seen = (~b[1].isinf())[..., None]
    return a[0] + b[0] * seen, torch.logaddexp(a[1], b[1])


def forgets(which: int):
    """The n-th shift delivers zeros."""
    calls = count(1)

    def shift(x: Tensor, *ring, by: int = 1) -> Tensor:
        return torch.zeros_like(x) if next(calls) == which else collectives.shift(x, *ring, by=by)

    return mock.patch.object(ring_attention, "shift", shift)


def unsummed_gradients():
    """The gradients of gathered keys and values are halved."""
    scatter = collectives._reduce_scatter
    return mock.patch.object(
        collectives, "_reduce_scatter", lambda x, ranks: scatter(x, ranks) * 0.5
    )


MUTANTS = {
    "positions left in order": ({}, changed("positions_T"), None),
    "targets left in order": ({}, changed("targets_T"), None),
    "documents ignored": (
        {"documents": True},
        mock.patch.object(
            ring_attention,
            "attention_and_lse",
            lambda q, k, v, documents, *rest: attention_and_lse(q, k, v, None, *rest),
        ),
        None,
    ),
    "a merge without rescaling": (
        {},
        mock.patch.object(ring_attention, "merge", merged_without_rescaling),
        None,
    ),
    "a block too many skipped": (
        {},
        mock.patch.object(
            ContextParallelMask, "later", property(lambda c: torch.ones(2, dtype=torch.bool))
        ),
        None,
    ),
    "a block too few skipped": (
        {},
        mock.patch.object(
            ContextParallelMask, "later", property(lambda c: torch.zeros(2, dtype=torch.bool))
        ),
        None,
    ),
    "pairs of the wrong half": (
        {},
        mock.patch.object(
            ring_attention,
            "_pairs",
            lambda x, late, first: torch.cat([x.chunk(2, dim=2)[first], x.chunk(2, dim=2)[1]]),
        ),
        None,
    ),
    "keys that never come": ({}, forgets(1), None),
    "keys that never come in backward": ({}, forgets(2), None),
    "gradients of keys that never come home": ({}, forgets(3), None),
    "gathered gradients not summed": ({"method": "allgather"}, unsummed_gradients(), None),
    "a row out of order": ({"method": "ulysses", "zigzag": "on"}, changed("zigzag"), None),
    "the wrong rank's sinks": (
        {"method": "ulysses", "sinks": True},
        None,
        lambda layout: ShiftedPlaces(layout.mesh, layout.rules),
    ),
}


class ShiftedPlaces(Layout):
    def iota(self, axis: str, size: int, device) -> Tensor:
        order = torch.arange(size, device=device)
        return self.shard(order.roll(1) if axis == "sequence" else order, axis)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants(name):
    choices, patch, mutate = MUTANTS[name]
    config = configured("cp=2", seed=1, **choices)
    with patch or nullcontext():
        assert_caught(lambda: assert_same_step(config, *([mutate] if mutate else [])))
