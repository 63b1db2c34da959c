"""The short search for placements chooses what DTensor's full search chooses."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor._op_schema import OpSchema, OpStrategy
from torch.distributed.tensor._sharding_prop import _select_min_cost_strategy

from dtron.distributed import sharding_search
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import same_on_all, simulated
from dtron.testing import assert_caught
from dtron.tools.verify_step import one_step
from tests.helpers.same_step import model_config
from tests.moe.test_moe_training import SPARSE


@contextmanager
def both_searches(monkeypatch, short):
    """Every search is made twice, and the choices are compared. Yields the number of strategies in
    each short list; 0 for a full search."""
    counts = []

    def search(full, mesh, schema, strategies, **named):
        found = short(full, mesh, schema, strategies, **named)
        every = full(mesh, schema, strategies, **named)
        counts.append(len(found.strategies) if found.strategies != every.strategies else 0)
        ours, theirs = (_select_min_cost_strategy(x, of_inputs(schema)) for x in (found, every))
        assert placements(ours) == placements(theirs), schema
        return every

    monkeypatch.setattr(sharding_search, "_search", search)
    yield counts


def of_inputs(schema):
    """The schema with the inputs themselves, as DTensor chooses by it."""
    args = [
        x.strategies[0].output_spec if isinstance(x, OpStrategy) else x for x in schema.args_schema
    ]
    return OpSchema(schema.op, tuple(args), schema.kwargs_schema, schema.schema_info)


def placements(spec):
    outputs = spec.output_specs if isinstance(spec.output_specs, tuple) else (spec.output_specs,)
    return [x and x.placements for x in (*outputs, *(spec.input_specs or ()))]


# Sizes of no other test: DTensor plans an operation once for each shape and mesh.
CASES = {
    "dense": ("dp_replicate=2,dp=2,tp=2", dict(zero=1, vocab=31, bias=True, tied=True)),
    "experts": ("dp=2,tp=2,ep=2,etp=2", dict(zero=3, vocab=37, moe=SPARSE.moe)),
}


def compare_searches(monkeypatch, name: str, short, embed: int = 14) -> list[int]:
    mesh, choices = CASES[name]
    config = model_config(mesh, 1, embed=embed, batch=4, **choices)
    config = replace(config, data=replace(config.data, seq_len=8))
    with both_searches(monkeypatch, short) as counts:
        one_step(config, MeshShape.parse(mesh))
    return counts


@pytest.mark.parametrize("name", CASES)
def test_the_choices_are_those_of_the_full_search(name, monkeypatch):
    counts = compare_searches(monkeypatch, name, sharding_search._search)
    assert len(counts) > 4 and sum(n > 0 for n in counts) > 0.8 * len(counts)


def test_another_choice_is_caught(monkeypatch):
    """A mutant takes the first combination that the search lists."""

    def first(full, mesh, schema, strategies, **named):
        return OpStrategy(full(mesh, schema, strategies, **named).strategies[:1])

    assert_caught(lambda: compare_searches(monkeypatch, "experts", first, embed=16))


def test_inputs_that_no_combination_has_take_the_full_search():
    with simulated(MeshShape(dp=2)) as mesh:
        ones = torch.ones(4, 3)
        partial = DTensor.from_local(ones, mesh, [Partial()])
        shards = DTensor.from_local(ones[:2], mesh, [Shard(0)])
        product = partial * shards
        assert not any(p.is_partial() for p in product.placements)
        assert same_on_all(product.full_tensor()).eq(2).all()


def test_torch_is_as_before_after_a_simulation():
    full = sharding_search.utils.expand_to_full_mesh_op_strategy
    with simulated(MeshShape(dp=2)):
        assert sharding_search.utils.expand_to_full_mesh_op_strategy is not full
    assert sharding_search.utils.expand_to_full_mesh_op_strategy is full
    assert sharding_search._matrix_ops.expand_to_full_mesh_op_strategy is full
