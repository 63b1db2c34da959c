"""Small tensors that share a collective have the same results as one by one, in fewer
collectives."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtron.distributed import bucketing
from dtron.distributed.bucketing import reduce_scatter_all, unshard_bucketed
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import ShardSpec, reduce_scatter
from dtron.distributed.simulated_ranks import simulated
from dtron.mesh import Layout
from dtron.rules import rules_for
from dtron.tools.count_collectives import CollectiveCounter

MESHES = ("dp=2", "dp=4", "dp=2,cp=2", "dp_replicate=2,dp=2", "dp=2,tp=2", "dp=4,ep=2")
AXES = (
    ("embed", "mlp"),
    ("mlp", "embed"),
    ("embed", "head_dim"),
    ("vocab", "embed"),
    ("act_embed",),
)


def drawn(layout: Layout, of: list[tuple[int, int, int]], dtype: torch.dtype, seed: int) -> tuple:
    """Weights with these axes and sizes (in fours), their placements, and their gradients.

    A gradient is a different summand on every rank, for every axis over which the gathered weight
    is replicated."""
    rank = layout.iota("tokens", layout.parts("tokens"), "cpu").to_local()
    weights, grads, goals = [], [], []
    for i, (kind, rows, columns) in enumerate(of):
        axes = AXES[kind]
        shape = (4 * rows, 4 * columns)[: len(axes)]
        numbers = torch.randn(
            shape, generator=torch.Generator().manual_seed(seed + i), dtype=torch.float64
        )
        weights.append(layout.shard(numbers, *axes))
        goals.append(layout.unsharded(*axes))
        whole = weights[-1].redistribute(layout.mesh, goals[-1])
        grads.append(
            ShardSpec.of(whole).gradient.to_dtensor(
                torch.sin(whole.to_local() * (3 + rank)).to(dtype), layout.mesh
            )
        )
    return weights, goals, grads


def differences(
    mesh: str, of: list[tuple[int, int, int]], dtype: torch.dtype, seed: int
) -> tuple[float, int]:
    """The largest difference from collectives one by one, of reduce-scattered gradients and of
    gathered weights; and how many fewer collectives there were."""
    with simulated(MeshShape.parse(mesh)) as device_mesh:
        layout = Layout(device_mesh, rules_for(2))
        weights, goals, grads = drawn(layout, of, dtype, seed)
        targets = [(w.placements, torch.float64) for w in weights]
        with CollectiveCounter(device_mesh) as few:
            got = reduce_scatter_all(grads, targets)
            some = unshard_bucketed(weights, goals, None)
        with CollectiveCounter(device_mesh) as many:
            want = [reduce_scatter(g, *target) for g, target in zip(grads, targets, strict=True)]
            one_by_one = {i: weights[i].redistribute(device_mesh, goals[i]) for i in some}
        pairs = [*zip(got, want, strict=True), *((some[i], one_by_one[i]) for i in some)]
        assert all(a.placements == b.placements and a.dtype == b.dtype for a, b in pairs)
        far = lambda a, b: (a.to_local() - b.to_local()).abs().max()
        worst = max((largest(far(a, b)) for a, b in pairs), default=0.0)
        return worst, many.count.total() - few.count.total()


def largest(x: Tensor) -> float:
    """The same on simulated ranks."""
    parts = getattr(x, "_local_tensors", None)
    return max(part.item() for part in parts.values()) if parts else x.item()


OF = st.lists(
    st.tuples(st.integers(0, len(AXES) - 1), st.integers(1, 3), st.integers(1, 3)), max_size=6
)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(MESHES), OF, st.sampled_from([torch.float64, torch.bfloat16]), st.integers(0, 9)
)
def test_together_is_one_by_one(mesh, of, dtype, seed):
    worst, fewer = differences(mesh, of, dtype, seed)
    assert worst < 1e-12 and fewer >= 0


def test_it_takes_fewer_collectives():
    """Four weights over dp need one reduce-scatter and one all-gather. Weights that tp shards too
    are not bucketed."""
    four = [(0, 1, 2), (1, 2, 1), (2, 1, 1), (3, 1, 1)]
    assert differences("dp=4", four, torch.float64, 0)[1] == 2 * 3
    assert differences("dp=2,cp=2", four, torch.float64, 0)[1] == 2 * 2 * 3
    assert differences("dp=2,tp=2", four, torch.float64, 0)[1] == 0
    with mock.patch.object(bucketing, "SMALL", 1):
        assert differences("dp=4", four, torch.float64, 0)[1] == 0


MUTANTS = {
    "all are cut along their first dim": (
        "_reduce_scatter_bucket",
        lambda grads, targets, axes, dtype, real=bucketing._reduce_scatter_bucket: real(
            grads, [[type(p)(0) if p.is_shard() else p for p in t] for t in targets], axes, dtype
        ),
    ),
    "another's": (
        "_all_gather_bucket",
        lambda ws, *a, real=bucketing._all_gather_bucket: real(ws, *a)[::-1],
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants(name):
    part, wrong = MUTANTS[name]
    with mock.patch.object(bucketing, part, wrong), pytest.raises((AssertionError, RuntimeError)):
        assert differences("dp=2", [(0, 2, 2), (1, 2, 2), (1, 2, 2)], torch.float64, 0)[0] < 1e-12
