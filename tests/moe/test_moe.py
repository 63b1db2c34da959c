"""Experts on any mesh give what one device gives, with every dispatcher; known bugs are caught."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full
from dtron.mesh import Layout
from dtron.moe.dispatch import ExpertGroup
from dtron.moe.layer import MoELayer
from dtron.params import declare, init
from dtron.testing import (
    LayerCase,
    assert_caught,
    assert_equivalent,
    dropped,
    poisoned_memory,
    run_layer,
    unsummed,
    zero_stages,
)
from dtron.tree import tree_map
from tests.helpers.experts import ONE, T, config, dims, expert_meshes, last_experts, layer


@settings(max_examples=40)
@given(
    mesh=expert_meshes(),
    zero=zero_stages(),
    seed=st.integers(0, 99),
    each=st.sampled_from([1, 2, 3]),
    top_k=st.sampled_from([1, 2, 3]),
    skew=st.sampled_from(["even", "one", "few"]),
    bias=st.booleans(),
    dispatch=st.sampled_from(["alltoall", "static", "allgather"]),
    shared=st.booleans(),
    score=st.sampled_from(["softmax", "topk_softmax", "sigmoid"]),
    activation=st.sampled_from(["swiglu", "clamped_swiglu"]),
    scores_on=st.sampled_from(["outputs", "inputs"]),
)
@pytest.mark.slow
def test_experts_on_any_mesh(mesh, zero, seed, dispatch, skew, shared, **choices):
    tp = MeshShape.parse(mesh).tp
    c = config(mesh, shared=4 * tp if shared else 0, shared_gate=shared, **choices)
    assert_equivalent(
        layer(c, dispatch, skew), MoELayer, mesh, dims(c), tokens=T, zero=zero, seed=seed
    )


FOLDED = [
    "dp=2,ep=2",
    "dp=2,tp=2,ep=4",
    "dp=4,ep=2",
    "tp=2,etp=2",
    "dp=2,cp=2,ep=4",
    "dp=2,tp=2,ep=2,etp=2",
]


@pytest.mark.parametrize("dispatch", ["alltoall", "static", "allgather"])
@pytest.mark.parametrize(("mesh", "skew"), [*zip(FOLDED, ["even", "one", "few"] * 2, strict=True)])
def test_experts(mesh, skew, dispatch):
    """All dispatchers agree with each other and with one device, if none drops tokens."""
    shared = 4 * MeshShape.parse(mesh).tp
    on = "inputs" if skew == "few" else "outputs"
    c = config(mesh, bias=True, shared=shared, shared_gate=True, scores_on=on)
    zero = 3 if dispatch == "static" else 1
    assert_equivalent(layer(c, dispatch, skew), MoELayer, mesh, dims(c), tokens=T, zero=zero)


@pytest.mark.parametrize("dispatch", ["alltoall", "static", "allgather"])
@pytest.mark.parametrize("mesh", ["dp=2,tp=2,ep=4", "dp=2,tp=2,ep=2,etp=2"])
def test_tokens_that_are_not_sent(mesh, dispatch):
    c = config(mesh, bias=True)
    assert_equivalent(layer(c, dispatch, padding=True), MoELayer, mesh, dims(c), tokens=T)


def padding_has_no_output() -> None:
    """Padding gets zeros, and other tokens what they get without padding."""
    c = replace(config("dp=1", bias=True), mlp=8)
    sizes = dims(c) | {"embed": 16, "expert_embed": 16}
    g = torch.Generator().manual_seed(0)
    x = torch.randn(T, 16, generator=g, dtype=torch.float64)
    p = init(declare(MoELayer, sizes), sizes, 0, ONE, torch.float64)
    want = in_bfloat16(layer(c))(p, x, ONE)
    want[::3] = 0
    with poisoned_memory():
        got = in_bfloat16(layer(c, padding=True))(p, x, ONE)
    torch.testing.assert_close(got, want)


def test_padding_has_no_output(monkeypatch):
    """Mutant: the rows of padding, which no kernel writes, are summed."""
    padding_has_no_output()
    monkeypatch.setattr(ExpertGroup, "sent", lambda experts, index_TK: None)
    assert_caught(padding_has_no_output)


def in_bfloat16(fn):
    """Run the layer in bfloat16, as on a GPU. There ``F.grouped_mm`` leaves rows behind the last
    expert unwritten."""

    def cast(p: MoELayer, x: Tensor, layout: Layout) -> Tensor:
        narrow = tree_map(lambda w: w.bfloat16(), p)
        return fn(narrow, x.bfloat16(), layout).double()

    return cast


def check_in_bfloat16(mesh: str, dispatch: str, **choices) -> None:
    """Rounding differs when a rank sums other rows: 2 ** -8 per sum, for some ten sums in
    sequence."""
    c = replace(
        config(mesh, bias=True, **choices), mlp=8 * MeshShape.parse(mesh).etp
    )  # 16 bytes a row
    sizes = dims(c) | {"embed": 16, "expert_embed": 16}
    with poisoned_memory():
        assert_equivalent(in_bfloat16(layer(c, dispatch)), MoELayer, mesh, sizes, 0.03, tokens=T)


@pytest.mark.parametrize("activation", ["swiglu", "clamped_swiglu"])
@pytest.mark.parametrize("dispatch", ["alltoall", "static", "allgather"])
@pytest.mark.parametrize("mesh", ["dp=2,ep=2", "dp=2,tp=2,ep=2,etp=2"])
def test_biases_in_bfloat16_with_poisoned_memory(mesh, dispatch, activation):
    on = "inputs" if activation == "swiglu" else "outputs"
    check_in_bfloat16(mesh, dispatch, activation=activation, scores_on=on)


def test_a_bias_that_reads_unwritten_rows_is_caught(monkeypatch):
    monkeypatch.setattr("dtron.moe.experts.product", last_experts)
    assert_caught(lambda: check_in_bfloat16("dp=2,ep=2", "allgather"))


@settings(max_examples=5)
@given(
    mesh=expert_meshes(),
    score=st.sampled_from(["softmax", "sigmoid"]),
    aux_level=st.sampled_from(["micro_batch", "sequence"]),
    skew=st.sampled_from(["even", "few"]),
)
def test_auxiliary_losses_on_any_mesh(mesh, skew, **choices):
    c = config(mesh, aux_loss=0.3, z_loss=0.2, **choices)
    fn = layer(c, skew=skew, aux=True)

    def whole(p, x, layout):  # every weight has a gradient, even zero
        e = p.experts
        rest = layout.local_map(
            lambda *ws: sum((w * 0).sum() for w in ws),
            (("experts", None, "expert_mlp"),) * 2 + (("experts", "expert_mlp", None),),
            ("+experts", "+expert_mlp"),
        )(e.w_gate, e.w_up, e.w_down)
        return fn(p, x, layout) + layout.constrain(rest)

    assert_equivalent(whole, MoELayer, mesh, dims(c), out=("+tokens_sp",), tokens=T)


# ---- mistakes


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("mesh", ["tp=2,etp=2", "dp=2,tp=2,ep=2,etp=2"])
def test_a_layer_without_one_constrain_is_caught(mesh, number):
    """The first constrain gathers tokens on all ranks that share an expert. The last one sums their
    results."""
    c = config(mesh)
    check = lambda m: assert_equivalent(layer(c), MoELayer, mesh, dims(c), tokens=T, mutate=m)
    assert_caught(lambda: check(dropped(number)))


@pytest.mark.parametrize("mesh", ["dp=4,ep=2", "dp=2,cp=2,ep=2", "tp=2,etp=2"])
def test_a_right_forward_with_wrong_gradients_is_caught(mesh):
    """Known bug elsewhere, under folding: the gradients of experts are not summed over all ranks
    that hold them."""
    c, seen = config(mesh), []

    def fn(p, x, layout):
        y = layer(c)(p, x, layout)
        seen.append(full(y.detach()))
        return y

    assert_caught(lambda: assert_equivalent(fn, MoELayer, mesh, dims(c), tokens=T, mutate=unsummed))
    torch.testing.assert_close(*seen)


def test_gradients_of_experts_that_are_twice_what_they_should_be_are_caught():
    """Known bug elsewhere: ranks that share tokens send them several times. The output is right,
    and the gradient of every expert is exactly double."""
    c, mesh = config("tp=2,ep=2"), "tp=2,ep=2"

    def doubled(layout: Layout) -> Layout:
        return replace(layout, rules={**layout.rules, "tokens_ep": layout.rules["tokens"]})

    run = lambda m: run_layer(LayerCase(layer(c), MoELayer, dims(c), tokens=T), mesh, m).tensors
    want, got = run(lambda layout: layout), run(doubled)
    torch.testing.assert_close(got["output"], want["output"])
    name = "gradient of experts.w_up"
    torch.testing.assert_close(got[name], 2 * want[name])
    assert_caught(
        lambda: assert_equivalent(layer(c), MoELayer, mesh, dims(c), tokens=T, mutate=doubled)
    )
