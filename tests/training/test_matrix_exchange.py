"""Matrices on their owners: whole, once, and back as shards. Newton-Schulz iterations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor, Shard

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full, like
from dtron.distributed.simulated_ranks import by_rank, simulated
from dtron.mesh import Layout
from dtron.rules import rules_for
from dtron.testing import meshes, zero_stages
from dtron.training.matrix_exchange import EXPERTS, Exchange, Job, deal
from dtron.training.newton_schulz import orthogonalized

KINDS = {
    ("embed", "mlp"): (6, 10),
    ("embed", "heads", "head_dim"): (7, 5, 2),
    ("heads", "head_dim", "embed"): (5, 2, 7),
}


@given(
    st.dictionaries(
        st.integers(0, 9),
        st.builds(Job, st.integers(1, 20), st.integers(1, 9), st.sampled_from([1, 3, 8])),
    )
)
def test_each_matrix_has_one_owner_and_work_is_even(jobs):
    dealt = deal(jobs)
    for kind, job in jobs.items():
        rows = dealt[kind]
        assert len(rows) == job.owners and len({len(row) for row in rows}) == 1
        assert sorted(i for row in rows for i in row if i is not None) == list(range(job.count))
        assert len(rows[0]) == math.ceil(job.count / job.owners)
    for owners in {job.owners for job in jobs.values()}:
        same = [kind for kind, job in jobs.items() if job.owners == owners]
        work = [
            sum(jobs[k].cost for k in same for i in dealt[k][r] if i is not None)
            for r in range(owners)
        ]
        assert max(work) - min(work) <= max(jobs[k].cost for k in same)


@given(
    mesh=meshes(8, ("dp_replicate", "dp", "cp", "tp")),
    zero=zero_stages(),
    axes=st.sampled_from(list(KINDS)),
    count=st.integers(1, 5),
)
def test_owners_have_whole_matrices_and_ranks_their_shards(mesh, zero, axes, count):
    with simulated(MeshShape.parse(mesh)) as devices:
        layout, shape = Layout(devices, rules_for(zero)), KINDS[axes]
        whole = [torch.arange(math.prod(shape)).view(shape) + 1000 * i for i in range(count)]
        shards = [layout.shard(x, *axes) for x in whole]
        exchange = Exchange(devices, tuple(shards[0].placements), shape)
        slots = deal({0: Job(count, 1, exchange.owners)})[0]
        owned = exchange.to_owners([x.to_local() for x in shards], slots)
        for rank, x in by_rank(owned, 0).items():
            for i, matrix in zip(slots[rank], x, strict=True):
                assert torch.equal(matrix, torch.zeros_like(matrix) if i is None else whole[i])
        back = exchange.to_shards(-owned, slots)
        for x, shard, part in zip(whole, shards, back, strict=True):
            assert torch.equal(full(like(shard, part)), -x)


def test_ranks_of_ep_keep_their_experts():
    """Four ranks of dp are two of ep and two of edp. Each deals the experts of its ep rank to
    edp."""
    with simulated(MeshShape.parse("dp=4,ep=2")) as devices:
        layout = Layout(devices, rules_for(1))
        experts = torch.arange(4 * 6 * 3).view(4, 6, 3)
        w = layout.shard(experts, "experts", "expert_embed", "expert_mlp")
        assert isinstance(w, DTensor)
        placements = tuple(
            EXPERTS if p.is_shard(0) else Shard(p.dim - 1) if isinstance(p, Shard) else p
            for p in w.placements
        )
        exchange = Exchange(devices, placements, (6, 3))
        assert exchange.owners == 2
        slots = deal({0: Job(2, 1, 2)})[0]
        owned = exchange.to_owners([*w.to_local().unbind()], slots)
        found = {int(x[0, 0, 0]) // 18 for x in by_rank(owned, 0).values()}
        assert found == {0, 1, 2, 3} and owned.shape == (1, 6, 3)
        back = torch.stack(exchange.to_shards(owned, slots))
        assert torch.equal(full(like(w, back)), experts)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32))
def test_singular_values_become_about_one(rows, columns, seed):
    """Singular vectors stay. Values above a hundredth of the largest are then between 0.6 and
    1.3."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, rows, columns, generator=g, dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    got = u.mT @ orthogonalized(x) @ v.mT
    diagonal = got.diagonal(dim1=-2, dim2=-1)
    assert (got - torch.diag_embed(diagonal)).abs().max() < 1e-8
    large = diagonal[s > 0.01 * s.amax(-1, keepdim=True)]
    assert ((large > 0.6) & (large < 1.3)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_matrix_of_zeros_stays_zero(dtype):
    assert not orthogonalized(torch.zeros(2, 3, 4, dtype=dtype)).any()
