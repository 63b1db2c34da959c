"""Sums of bfloat16 gradients over ranks: summed in float32, sent in bfloat16."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtron.distributed import redistribute
from dtron.distributed.bucketing import reduce_scatter_all
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import ShardSpec, cast, full
from dtron.distributed.simulated_ranks import simulated
from dtron.mesh import Layout
from dtron.rules import rules_for
from dtron.tools.count_collectives import Collective, CollectiveCounter

MESHES = ("dp=2", "dp=4", "dp=2,cp=2", "dp=3,cp=2", "dp_replicate=2,dp=2", "dp=2,tp=2", "dp=3,tp=2")
WEIGHTS = {"w_up": ("embed", "mlp"), "w_down": ("mlp", "embed")}


def gradient(axes: tuple[str, ...], shape: tuple[int, int], seed: int, layout: Layout) -> Tensor:
    """A gradient in bfloat16 that differs on each rank, with a pending sum over the axes that
    replicate the weight."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    w = layout.shard(numbers, *(None if a == "embed" else a for a in axes))
    rank = layout.iota("tokens", layout.parts("tokens"), "cpu").to_local()
    return ShardSpec.of(w).gradient.to_dtensor(
        torch.sin(w.to_local() * (3 + rank)).bfloat16(), layout.mesh
    )


def scattered(mesh: str, name: str, size: int, seed: int) -> tuple[float, CollectiveCounter]:
    """The largest error of a reduce-scattered gradient ``[size, size]``, relative to its largest
    value; and what was sent."""
    with simulated(MeshShape.parse(mesh)) as device_mesh:
        layout, axes = Layout(device_mesh, rules_for(2)), WEIGHTS[name]
        g = gradient(axes, (size, size), seed, layout)
        want = full(cast(g, torch.float32))
        with CollectiveCounter(device_mesh) as sent:
            (got,) = reduce_scatter_all([g], [(layout.placements(*axes), torch.float32)])
        assert got.dtype == torch.float32
        lies = zip(got.placements, layout.placements(*axes), strict=True)
        assert all(a == b for a, b in lies if b.is_shard())
        return ((full(got) - want).abs().max() / want.abs().max()).item(), sent


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(MESHES), st.sampled_from(sorted(WEIGHTS)), st.integers(4, 30), st.integers(0, 9)
)
def test_a_sum_of_narrow_summands_is_wide(mesh, name, half, seed):
    """Whether or not the shards are equal."""
    assert scattered(mesh, name, 2 * half, seed)[0] < 1e-6


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(
    ("mesh", "size", "sent"),
    [
        ("dp=4", 24, {("all_to_all", "dp"): 3 / 4 * 2}),
        ("dp=2,tp=2", 24, {("all_to_all", "dp"): 1 / 2 * 1}),
        (
            "dp=2,cp=2",
            24,
            {("all_to_all", "dp"): 1 / 2 * 2, ("reduce_scatter", "cp"): 2},
        ),  # already in float32
        ("dp=4", 22, {("reduce_scatter", "dp"): 24 / 22 * 4}),  # unequal shards: padded
        (
            "dp=3,cp=2",
            16,
            {("reduce_scatter", "dp"): 18 / 16 * 4, ("reduce_scatter", "cp"): 6 / 16 * 4},
        ),
    ],
)
def test_what_is_sent_is_narrow(name, mesh, size, sent):
    """In bytes per number of the gradient. A rank does not send its own shard to itself."""
    got = scattered(mesh, name, size, 0)[1].bytes
    assert got == {Collective(*c): n * size**2 for c, n in sent.items()}


MUTANTS = {
    "added up in bfloat16": (
        "_all_to_all_then_sum",
        lambda g, axis, dim, dtype, land=redistribute._all_to_all_then_sum: land(
            g, axis, dim, g.dtype
        ),
    ),
    "a rank's own pieces": ("exchange_rows", lambda x, mesh, dim: (x[0], x[1:])),
    "another's piece stays": (
        "exchange_rows",
        lambda x, mesh, dim, swap=redistribute.exchange_rows: (x[0], swap(x, mesh, dim)[1]),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants(name):
    part, wrong = MUTANTS[name]
    with mock.patch.object(redistribute, part, wrong), pytest.raises(AssertionError):
        assert scattered("dp=4", "w_up", 24, 0)[0] < 1e-6


@pytest.mark.parametrize("count", [1, 3])
def test_a_gradient_that_is_no_pending_sum_is_only_cut(count):
    """Also beside other gradients, which could share a collective."""
    with simulated(MeshShape(dp=4)) as mesh:
        layout, x = Layout(mesh, rules_for(2)), torch.arange(24.0).view(8, 3).bfloat16()
        goal = (layout.placements("embed", None), torch.float32)
        got = reduce_scatter_all(
            [layout.shard(x, None, None) for _ in range(count)], [goal] * count
        )
        assert all(torch.equal(full(g), x.float()) for g in got)
