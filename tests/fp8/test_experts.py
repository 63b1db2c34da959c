"""Matmuls of experts in FP8: by definition, on a mesh, compiled, and without rows."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dtron.fp8.scaled_mm as product
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import simulated
from dtron.fp8.__main__ import error
from dtron.fp8.matmul import compile_options, grouped_matmul, matmul
from dtron.fp8.recipes import RECIPES
from dtron.mesh import Layout
from dtron.model.compute_config import ComputeConfig
from dtron.model.presets import preset
from dtron.moe.config import MoEConfig
from dtron.rules import rules_for
from dtron.runtime.config import DataConfig, RunConfig
from dtron.runtime.validate import check_fp8
from dtron.testing import assert_caught
from tests.helpers.products import ERRORS
from tests.helpers.runs import MODEL, simulate, train

ROWWISE, HALF = (
    replace(RECIPES["rowwise"], min_weights=0),
    replace(RECIPES["rowwise_with_gw_hp"], min_weights=0),
)


def operands(counts: list[int], inner: int = 32, outer: int = 48, rest: int = 0, seed: int = 0):
    """Rows, matrices, the end of each expert's rows, and a gradient that is zero in rows without an
    expert."""
    g = torch.Generator().manual_seed(seed)
    rows, used = sum(counts) + rest, sum(counts)
    x, w = (
        torch.randn(s, generator=g).requires_grad_()
        for s in ((rows, inner), (len(counts), inner, outer))
    )
    dy = torch.randn(rows, outer, generator=g)
    dy[used:] = 0
    return x, w, torch.tensor(counts).cumsum(0), dy


def all_of(fn, x: Tensor, w: Tensor, ends_E: Tensor | None, dy: Tensor) -> list[Tensor]:
    y = fn(x, w, ends_E)
    return [torch.where(dy != 0, y, 0), *torch.autograd.grad(y, (x, w), dy)]


in_fp8 = partial(grouped_matmul, recipe=ROWWISE)


def one_by_one(x: Tensor, w: Tensor, ends_E: Tensor) -> Tensor:
    """Each expert's matmul is the FP8 matmul of its rows."""
    ends = [0, *ends_E.tolist()]
    parts = [
        matmul(x[a:b], w_e, HALF) if b > a else x[a:b] @ w_e
        for a, b, w_e in zip(ends[:-1], ends[1:], w.unbind(), strict=True)
    ]
    return torch.cat([*parts, x[ends[-1] :] @ w[0] * 0])


def is_each_product(counts: list[int], rest: int, seed: int) -> None:
    x, *others = operands(counts, rest=rest, seed=seed)
    x = (x * 2.0 ** (torch.arange(len(x))[:, None] % 40)).detach().requires_grad_()  # of all sizes
    for a, b in zip(all_of(in_fp8, x, *others), all_of(one_by_one, x, *others), strict=True):
        assert ((a - b).norm(dim=-1) <= 1e-4 * b.norm(dim=-1)).all()


@settings(max_examples=20)
@given(
    counts=st.lists(st.integers(0, 3).map(lambda n: 16 * n), min_size=1, max_size=5).filter(any),
    rest=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_each_expert_has_the_product_that_it_would_have_alone(counts, rest, seed):
    is_each_product(counts, rest, seed)


def test_a_scale_for_all_rows_is_caught():
    scaled = product.scaled_by
    with mock.patch("dtron.fp8.scaled_grouped_mm.scaled_by", lambda x, summed: scaled(x, None)):
        assert_caught(lambda: is_each_product([16, 32], 0, 0))


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any), seed=st.integers(0, 9)
)
@settings(max_examples=20)
def test_any_number_of_rows(counts, seed):
    """The numbers of rows are not multiples of 16. The error stays within 3 bits."""
    xs = operands(counts, seed=seed)
    want = all_of(lambda x, w, ends: one_by_one(x.double(), w.double(), ends).float(), *xs)
    for a, b, expected in zip(all_of(in_fp8, *xs), want, ERRORS["rowwise_with_gw_hp"], strict=True):
        assert a.isfinite().all() and error(a, b) < 1.6 * expected + 1e-6 * (
            expected == ERRORS["rowwise"]
        )


def test_as_many_rows_for_each():
    x, w, ends_E, dy = operands([24] * 3)
    batched = lambda x, w, _: in_fp8(x.unflatten(0, (3, 24)), w, None).flatten(0, 1)
    for a, b in zip(all_of(batched, x, w, None, dy), all_of(in_fp8, x, w, ends_E, dy), strict=True):
        assert a.equal(b)


def test_what_is_not_converted():
    x, w, ends_E, _ = operands([16, 16])
    assert grouped_matmul(x, w, ends_E, None) is None
    assert grouped_matmul(x, w, ends_E, RECIPES["rowwise"]) is None, "too small"
    assert grouped_matmul(x[:, :24], w[:, :24], ends_E, ROWWISE) is None, "no multiple of 16"
    assert grouped_matmul(x[:0], w, ends_E * 0, ROWWISE) is None, "no rows"
    assert grouped_matmul(x, w, ends_E, ROWWISE) is not None


def test_compiled_is_eager():
    xs, options = operands([16, 0, 40], rest=3), compile_options(ROWWISE)
    torch.compiler.reset()
    fn = torch.compile(in_fp8, fullgraph=True, dynamic=False, backend="aot_eager")
    assert options
    for a, b in zip(all_of(fn, *xs), all_of(in_fp8, *xs), strict=True):
        assert a.abs().max() > 0 and error(a, b) < 1e-5


SPARSE = replace(
    MODEL, embed=32, head_dim=8, mlp=32, moe=MoEConfig(experts=4, top_k=2, mlp=32, balanced=True)
)
RUN = RunConfig(
    model=SPARSE, data=DataConfig(seq_len=16), batch=8, steps=3, seed=3, fp8_first_last=True
)


@pytest.mark.parametrize("dispatch", ["alltoall", "static", "allgather"])
def test_a_mesh_follows_one_device(dispatch):
    config = replace(RUN, fp8="rowwise", fp8_min_weights=0, micro_batch=2, moe_dispatch=dispatch)
    alone = lambda c: train(Layout(), MeshShape(), replace(c, moe_dispatch="auto")).losses
    want = alone(config)
    assert simulate("dp=2,ep=2", config).losses == pytest.approx(want, rel=1e-4)
    assert alone(replace(config, fp8="none")) != pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_simulated_ranks_have_rows_of_their_own_in_bfloat16(recipe):
    """Under ``alltoall`` each simulated rank has its own number of rows. In bfloat16 the matmuls
    that stay in high precision once failed there."""
    config = replace(RUN, fp8=recipe, fp8_min_weights=0, steps=1, moe_dispatch="alltoall")
    config = replace(config, model=replace(SPARSE, moe=replace(SPARSE.moe, balanced=False)))
    with simulated(MeshShape.parse("dp=2,ep=2")) as mesh:
        layout = Layout(mesh, rules_for(1), compute=torch.bfloat16)
        got = train(layout, MeshShape.parse("dp=2,ep=2"), config)
    alone = replace(config, moe_dispatch="auto")
    want = train(Layout(compute=torch.bfloat16), MeshShape(), alone)
    assert got.losses == pytest.approx(want.losses, rel=1e-2)
    assert got.norms == pytest.approx(want.norms, rel=5e-2)


def test_a_model_whose_experts_alone_are_large_enough():
    """Matrices of 4096 by 14336 are in FP8. Those of a smaller model are not."""
    check = lambda name, how: check_fp8(how, preset(name), MeshShape(), 4096, torch.bfloat16)
    check("mixtral-8x7b", ComputeConfig(fp8="rowwise"))
    with pytest.raises(ValueError, match="no matrix of this model has 16777216 weights"):
        check("qwen3-30b-a3b", ComputeConfig(fp8="rowwise"))
