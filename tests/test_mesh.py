"""One mesh with two views: dp, cp and tp for the model are edp, ep and etp for its experts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate

from dtron.distributed.mesh_shape import AXES, MeshShape, parts
from dtron.distributed.redistribute import full
from dtron.distributed.simulated_ranks import simulated
from dtron.mesh import Layout
from dtron.rules import RULES, place

sizes = st.sampled_from([1, 2, 3, 4, 6, 8])


@st.composite
def folded(draw):
    """A mesh, and ep and etp that fit."""
    dp, cp, tp = draw(sizes), draw(sizes), draw(sizes)
    divisors = lambda n: [d for d in range(1, n + 1) if n % d == 0]
    etp = draw(st.sampled_from(divisors(dp * cp * tp)))
    ep = draw(st.sampled_from(divisors(dp * cp * tp // etp)))
    return MeshShape(draw(sizes), draw(sizes), dp, cp, tp, ep, etp)


@given(folded())
def test_every_axis_is_a_product_of_atoms(shape):
    atoms = shape.atoms
    assert math.prod(atoms.values()) == shape.size and all(n > 1 for n in atoms.values())
    for axis, n in {**shape.sizes, "ep": shape.ep, "etp": shape.etp, "edp": shape.edp}.items():
        assert math.prod(atoms[a] for a in parts(atoms, axis)) == n == shape.parts(axis), axis
    covered = [a for axis in ("edp", "ep", "etp") for a in parts(atoms, axis)]
    assert sorted(covered) == sorted(a for axis in ("dp", "cp", "tp") for a in parts(atoms, axis))
    order = [next(axis for axis in AXES if a in parts(atoms, axis)) for a in atoms]
    assert order == sorted(order, key=AXES.index)  # tp stays innermost


@given(folded())
def test_weights_of_experts_and_of_the_rest_lie_on_the_same_mesh(shape):
    atoms = list(shape.atoms)
    lies = place(RULES, atoms, "experts", "expert_embed", "expert_mlp")

    def cut(dim):
        return math.prod(
            shape.atoms[a]
            for a, p in zip(atoms, lies, strict=True)
            if p.is_shard() and p.dim == dim
        )

    assert [cut(dim) for dim in range(3)] == [shape.ep, shape.edp, shape.etp]
    whole = [a for a, p in zip(atoms, lies, strict=True) if not p.is_shard()]
    assert set(whole) <= {"pp", "dp_replicate"}


@given(folded())
def test_the_text_of_a_mesh_reads_back(shape):
    assert MeshShape.parse(str(shape)) == shape


def test_without_expert_parallelism_the_atoms_are_the_axes():
    assert MeshShape(2, 1, 4, 1, 2).atoms == {"pp": 2, "dp": 4, "tp": 2}


def test_where_ranks_come_from():
    """tp first, then dp; etp before ep."""
    assert MeshShape.parse("dp=8,tp=2,ep=8").atoms == {"dp.edp": 2, "dp.ep": 4, "tp.ep": 2}
    assert MeshShape.parse("dp=4,tp=4,ep=4,etp=2").atoms == {
        "dp.edp": 2,
        "dp.ep": 2,
        "tp.ep": 2,
        "tp.etp": 2,
    }


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("dp=4,ep=3", r"ep=3 must divide dp\*cp\*tp/etp = 4/1; use ep=2"),
        ("dp=2,tp=2,ep=4,etp=2", r"ep=4 must divide dp\*cp\*tp/etp = 4/2; use ep=2"),
        ("dp=4,etp=3", r"must divide dp\*cp\*tp/etp = 4/3; use etp=2"),
        ("dp_replicate=4,ep=2", r"ep=2 must divide dp\*cp\*tp/etp = 1/1; use ep=1, or change dp"),
    ],
)
def test_axes_that_do_not_fit_are_refused(mesh, message):
    with pytest.raises(ValueError, match=message):
        _ = MeshShape.parse(mesh).atoms


@pytest.mark.parametrize("size", [8, 10])
def test_pieces_of_pieces_are_gathered_right_where_their_ranks_are_a_group_too(size):
    """Known silent error of torch, here the mutant: it gathers over the group as if all tensors
    were sharded once."""
    x = torch.arange(size * 3.0).view(size, 3)
    with simulated(MeshShape.parse("dp=2,cp=2,ep=4")) as mesh:
        layout = Layout(mesh)  # with the group of ep: all ranks of dp and cp
        w = layout.shard(x, "embed", None)
        assert torch.equal(full(w), x)
        assert torch.equal(full(layout.unshard(w, "embed", None)), x)
        at_once = w.redistribute(mesh, [Replicate(), Replicate()]).to_local().reconcile()
        assert torch.equal(at_once, x) == (size == 8)
