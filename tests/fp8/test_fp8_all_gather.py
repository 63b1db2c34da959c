"""Weights gathered in 8 bits: a rank receives the values to which an FP8 matmul rounds them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtron.distributed import collectives, redistribute
from dtron.distributed.fp8_all_gather import packed, unpacked
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full
from dtron.distributed.simulated_ranks import simulated
from dtron.fp8.__main__ import products
from dtron.fp8.recipes import RECIPES
from dtron.fp8.scaled_mm import scaled_by
from dtron.mesh import Layout
from dtron.model.compute_config import ComputeConfig
from dtron.model.transformer import declare_model
from dtron.moe.config import MoEConfig
from dtron.rules import rules_for
from dtron.runtime.config import RunConfig
from dtron.runtime.launch import plan_run
from dtron.testing import assert_caught
from dtron.tools.count_collectives import Collective, CollectiveCounter
from dtron.tree import flat
from tests.fp8.test_training import BLOCK, FP8, SIZES, norms_on_pool
from tests.helpers.products import NAMES, converted
from tests.helpers.runs import on_pool, simulate


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Sent to oneself."""
    return unpacked(packed(x)[None], x.shape, x.dtype)[0]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=3),
    st.integers(-30, 80),
    st.integers(0, 99),
    st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_a_message_has_what_each_row_rounds_to(shape, power, seed, dtype):
    """torchao's scales and casts, whose smallest scale is 1e-12. Repeated rounding changes nothing
    more."""
    x = drawn(*shape, seed=seed, dtype=dtype) * 2.0**power
    values, scale = scaled_by(x, x.ndim - 1)
    got = rounded(x)
    assert got.equal((values.float() / scale).to(dtype)) and rounded(got).equal(got)


def test_rows_that_are_nothing_or_no_number():
    x = drawn(4, 16)
    x[1], x[2, 3] = 0, torch.nan
    got = rounded(x)
    assert got[1].count_nonzero() == 0 and got[2].isnan().any()
    assert got[[0, 3]].equal(rounded(drawn(4, 16)[[0, 3]]))


@pytest.mark.parametrize("name", [name for name in NAMES if RECIPES[name].fp8_gather])
def test_a_product_does_not_see_who_rounded_its_weight(name):
    """For every recipe, in both directions, a scale is a power of two."""
    x, w, g = drawn(128, 256), drawn(256, 128, seed=1), drawn(128, 128, seed=2)
    w = torch.where(w.abs() < 0.02, 0.02, w)  # nothing that leaves the range under a coarser scale
    for a, b in zip(
        products(converted(name), x, rounded(w), g), products(converted(name), x, w, g), strict=True
    ):
        assert a.equal(b)


MESHES = (
    "dp=2",
    "dp=4",
    "dp=2,cp=2",
    "dp_replicate=2,dp=2",
    "dp=2,tp=2",
    "dp=4,ep=2",
    "dp=2,cp=2,ep=4",
    "dp=3",
)
AXES = (
    ("embed", "mlp"),
    ("mlp", "embed"),
    ("embed", "heads", "head_dim"),
    ("experts", "expert_embed", "expert_mlp"),
    ("experts", "expert_mlp", "expert_embed"),
)


def gathered(
    mesh: str, axes: tuple[str, ...], rows: int, seed: int
) -> tuple[CollectiveCounter, int]:
    """Compare a gather in 8 bits with a gather of the rounded shards, and its gradient with the
    gradient of a gather in bfloat16.

    Returns what was sent, and the values that a rank then has."""
    x = drawn(*(4 * rows for _ in axes), seed=seed, dtype=torch.float32)
    with simulated(MeshShape.parse(mesh)) as device_mesh:
        layout = Layout(device_mesh, rules_for(3), torch.bfloat16)
        w = layout.shard(x, *axes).requires_grad_()
        gather = lambda w, fp8: layout.unshard(w, *axes, fp8=fp8)
        with CollectiveCounter(device_mesh) as sent:
            got = gather(w, True)
        parts = w.detach().to_local()
        if layout.needs_unshard(w, *axes) and redistribute.equal_parts(w, w.placements):
            parts = rounded(parts.bfloat16()).float()
        want = gather(redistribute.like(w, parts), False)
        assert got.placements == want.placements and got.stride() == want.stride()
        assert full(got).equal(full(want))
        ones = redistribute.shard_like(torch.ones(x.shape, dtype=torch.bfloat16), got)
        (a,), (b,) = (torch.autograd.grad(gather(w, fp8), w, ones) for fp8 in (True, False))
        assert a.placements == b.placements and full(a).equal(full(b))
        return sent, got.to_local().numel()


@settings(max_examples=30)
@given(st.sampled_from(MESHES), st.sampled_from(AXES), st.integers(1, 3), st.integers(0, 99))
def test_a_gather_has_what_each_part_rounds_to(mesh, axes, rows, seed):
    """On dp=3 a weight of 12 rows has equal shards. Weights of 4 and 8 rows are sent in
    bfloat16."""
    gathered(mesh, axes, rows, seed)


def test_parts_in_the_wrong_order_are_caught():
    def reversed_(x, mesh, dim):
        return collectives.gather_along(x, mesh, dim).flip(0)

    gathered("dp=2,cp=2", AXES[1], 2, 0)
    with mock.patch.object(redistribute, "gather_along", reversed_):
        assert_caught(lambda: gathered("dp=2,cp=2", AXES[1], 2, 0))


@pytest.mark.parametrize("axes", AXES[:3])
def test_it_sends_half_the_bytes(axes):
    """A byte per value, and a byte per row of a shard."""
    sent, values = gathered("dp=4", axes, 4, 0)
    cut = 4 if axes[-1] == "embed" else 1  # rows, where the last dim is cut
    assert sent.count == {Collective("all_gather", "dp"): 1}
    assert sent.bytes == {Collective("all_gather", "dp"): values + values // 16 * cut}


# ---- in a model

SHARDED = replace(FP8, model=BLOCK, zero=3, micro_batch=2, steps=2)
SPARSE = replace(SHARDED, model=replace(BLOCK, moe=MoEConfig(4, 2, 32)))


@cache
def losses(mesh: str, config: RunConfig) -> list[float]:
    return simulate(mesh, config).losses


@pytest.mark.parametrize(
    ("mesh", "name"),
    [("dp=2,tp=2", "tensorwise"), pytest.param("dp=2", "rowwise", marks=pytest.mark.slow)],
)
def test_a_step_is_that_of_weights_gathered_in_high_precision(mesh, name):
    """Except for values below the range of a scale of the whole tensor."""
    config = replace(SHARDED, fp8=name)
    assert losses(mesh, replace(config, fp8_gather=True)) == pytest.approx(
        losses(mesh, config), rel=1e-5
    )


@pytest.mark.parametrize(
    "config",
    [
        SPARSE,
        pytest.param(replace(SHARDED, fp8_min_weights=2000), marks=pytest.mark.slow),
        pytest.param(
            replace(SHARDED, fp8_first_last=False, model=replace(SIZES, layers=3)),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_multiplied_in_high_precision_is_gathered_so(config):
    """These stay in bfloat16: routers, small matrices, the first and the last block."""
    want, fp8 = losses("dp=2", config), replace(config, fp8_gather=True)
    assert losses("dp=2", fp8) == pytest.approx(want, rel=1e-5)
    with mock.patch.object(
        ComputeConfig, "fp8_gather_rule", lambda self, end, tokens: lambda w, shape: len(shape) > 1
    ):
        assert simulate("dp=2", fp8).losses != pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("recompute", ["full", pytest.param("selective", marks=pytest.mark.slow)])
def test_recomputed_blocks_gather_the_same(recompute):
    fp8 = replace(SHARDED, fp8="tensorwise", fp8_gather=True)
    assert losses("dp=2,tp=2", replace(fp8, recompute=recompute)) == losses("dp=2,tp=2", fp8)


@pytest.mark.xdist_group("pool")
def test_real_ranks_and_compiled_stages(pair):
    how = replace(SHARDED, fp8_gather=True).how
    want, got = (
        pair.run(norms_on_pool, "dp=2", 3, backend, how) for backend in (None, "aot_eager")
    )
    assert got[0] == pytest.approx(want[0], rel=1e-5) and want[0] == pytest.approx(
        want[-1], rel=1e-6
    )


@pytest.mark.slow
@pytest.mark.xdist_group("pool")
def test_real_ranks_do_what_simulated_ones_do(pool):
    fp8 = replace(SHARDED, fp8_gather=True)
    got = pool.run(on_pool, "dp=2,tp=2", fp8)
    assert got[0][0] == pytest.approx(losses("dp=2,tp=2", fp8), rel=1e-5)


def test_every_product_of_a_block_says_what_it_sums_over():
    """The gather is in 8 bits, and no other collective is."""
    m = replace(SIZES, moe=MoEConfig(4, 2, 32, dense_layers=1, shared=32), qkv_bias=True)
    named = {w.path.rpartition(".")[2] for w in flat(declare_model(m).blocks) if w.summed}
    assert named == {"w_q", "w_k", "w_v", "w_o", "w_gate", "w_up", "w_down"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"fp8": "none"}, "--fp8-gather.*use --fp8 tensorwise"),
        ({"zero": 1}, "--fp8-gather --zero 1.*use --zero 3, or drop"),
        (
            {"mesh": "pp=2", "simulate": True},
            "every block gathers; use --zero 3 --zero3-gather microbatch",
        ),
    ],
)
def test_refused_at_the_edge(changes, says):
    good = replace(SHARDED, model=SIZES, fp8_gather=True, device="cpu")
    plan_run(good)
    with pytest.raises(ValueError, match=says):
        plan_run(replace(good, **changes))
