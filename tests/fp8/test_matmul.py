"""FP8 matmuls: their error, on one device, on a mesh and compiled; and which matmuls are in FP8."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import dtron.fp8.matmul as fp8
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full, shard, shard_like
from dtron.distributed.simulated_ranks import simulated
from dtron.errors import PlacementError
from dtron.fp8.__main__ import error, products, table
from dtron.fp8.matmul import matmul
from dtron.fp8.recipes import RECIPES
from dtron.layers.mlp import MLP, mlp
from dtron.testing import assert_caught, assert_equivalent, dropped
from dtron.tools.count_collectives import CollectiveCounter, no_hidden_communication
from tests.helpers.paths import ROOT
from tests.helpers.products import (
    ERRORS,
    NAMES,
    SCALED,
    SCALED_BY_ROW,
    TORCHAO,
    converted,
    operands,
)


@pytest.mark.parametrize("name", NAMES)
def test_errors_are_those_of_the_recipe(name):
    """The error is not larger than expected. It is not much smaller either, which would mean that
    the matmul was not in FP8."""
    xs = operands(dtype=torch.bfloat16)
    want = products(torch.matmul, *(x.double() for x in xs))
    got = products(converted(name), *xs)
    for a, b, expected in zip(got, want, ERRORS[name], strict=True):
        assert a.dtype == torch.bfloat16 and 0.5 * expected < error(a, b) < 1.2 * expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TORCHAO)
def test_it_is_what_torchao_computes(name, dtype):
    """With scales that are powers of two. The gradient of a weight has the weight's memory
    layout."""
    import dtron.fp8.scaled_mm  # noqa: F401, I001  (torchao's first import, quietly)
    from torchao.float8.config import Float8LinearConfig
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
    from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig

    mm = LinearMMConfig(*3 * [ScaledMMConfig(emulate=True)])
    config = replace(Float8LinearConfig.from_recipe_name(name), round_scales_to_power_of_2=True)
    xs = operands(dtype=dtype)
    want = products(lambda x, w: matmul_with_hp_or_float8_args.apply(x, w, mm, config), *xs)
    got = products(converted(name), *xs)
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < (1e-6 if dtype == torch.float32 else 1e-4)
    assert [a.stride() for a in got] == [xs[2].stride(), xs[0].stride(), xs[1].stride()]


@settings(max_examples=20)
@given(st.sampled_from(SCALED), st.integers(-20, 20), st.integers(-20, 20), st.integers(0, 99))
def test_no_magnitude_is_out_of_range(name, i, j, seed):
    """448 is the largest value of e4m3. Multiplying an operand by a power of two changes nothing
    else."""
    x, w, g = operands(128, 256, 128, seed=seed)
    y, dx, dw = products(converted(name), x, w, g)
    got = products(converted(name), x * 2.0**i, w * 2.0**j, g)
    for a, b in zip(got, (y * 2.0 ** (i + j), dx * 2.0**j, dw * 2.0**i), strict=True):
        assert a.isfinite().all() and error(a, b) < 1e-5


@settings(max_examples=20)
@given(st.integers(0, 31), st.integers(20, 30))
def test_one_huge_row_ruins_all_others_unless_it_has_its_own_scale(row, power):
    x, w, _ = operands(128, 256, 128)
    x[row] *= 2.0**power
    others = torch.arange(128) != row
    off = lambda name: error(converted(name)(x, w)[others], (x @ w)[others])
    assert off("tensorwise") > 0.9 and max(map(off, SCALED_BY_ROW)) < 0.05


def rounded(x: Tensor, rows: int, columns: int) -> Tensor:
    """Round to e4m3 with one power of two per block of this size, so that the largest value is in
    range."""
    x = x.double().clone()
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            block = x[i : i + rows, j : j + columns]
            scale = 2.0 ** (448 / block.abs().max()).log2().floor()
            block.copy_((block * scale).to(torch.float8_e4m3fn).double() / scale)
    return x


def blockwise_is_its_definition(
    activation: tuple[int, int] = (1, 128), weight: tuple[int, int] = (128, 128)
):
    """For values of all magnitudes, from block to block and from row to row."""
    x, w, g = (t * 2.0 ** (torch.arange(len(t))[:, None] % 16) for t in operands(256, 384, 128))
    x, w = (
        x * 2.0 ** (torch.arange(384) // 128 * 9),
        w * 2.0 ** (-torch.arange(384)[:, None] // 128 * 9),
    )
    across = lambda t: rounded(t.t(), *activation)
    want = [
        rounded(x, *activation) @ rounded(w, *weight),
        rounded(g, *activation) @ rounded(w.t(), *weight),
        across(x) @ across(g).t(),
    ]
    for a, b in zip(products(converted("blockwise"), x, w, g), want, strict=True):
        assert ((a - b).norm(dim=1) < 1e-5 * b.norm(dim=1)).all()


def test_blockwise_is_its_definition():
    blockwise_is_its_definition()
    assert_caught(lambda: blockwise_is_its_definition(activation=(128, 128)))
    assert_caught(lambda: blockwise_is_its_definition(weight=(384, 128)))


def test_blockwise_compiled_is_eager():
    torch.compiler.reset()
    fn = torch.compile(converted("blockwise"), fullgraph=True, backend="aot_eager")
    xs = operands()
    for a, b in zip(products(fn, *xs), products(converted("blockwise"), *xs), strict=True):
        assert a.abs().max() > 0 and error(a, b) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_only_what_is_asked_for_is_computed(name):
    x, w, g = operands(128, 128, 128)
    _, dx, dw = products(converted(name), x, w, g)
    for one, other, want in [(x, w, dx), (w, x, dw)]:
        one = one.clone().requires_grad_()
        y = converted(name)(*((one, other) if want is dx else (other, one)))
        assert torch.autograd.grad(y, one, g)[0].equal(want)


def test_the_errors_shown_are_those_of_the_command():
    page = (ROOT / "docs" / "fp8.md").read_text()
    assert "\n".join(table()) in page


# --- which products ---


@pytest.mark.parametrize(
    ("sizes", "yes"),
    [
        ((8192, 4096, 4096), True),
        ((8192, 4096, 4095), False),
        ((8192, 4096, 4080), False),  # too small
        ((8192, 4096, 4104), False),  # no multiple of 16
        ((8192, 4104, 4096), False),
        ((8200, 4096, 4096), False),
        ((0, 4096, 4096), False),
        ((4096.5, 4096, 4096), False),  # sharded unevenly
    ],
)
def test_which_products_are_converted(sizes, yes):
    assert RECIPES["tensorwise"].converts(*sizes) is yes


@pytest.mark.parametrize(
    ("t", "i", "o"), [(0, 32, 32), (8, 32, 32), (16, 24, 32), (16, 32, 40), (16, 32, 32)]
)
def test_others_are_plain_products(t, i, o):
    xs = operands(t, i, o)
    want, got = products(torch.matmul, *xs), products(converted("rowwise"), *xs)
    assert got[0].equal(want[0]) is ((t, i, o) != (16, 32, 32)) and got[2].shape == (i, o)
    small = products(
        partial(matmul, recipe=replace(RECIPES["rowwise"], min_weights=i * o + 1)), *xs
    )
    assert all(a.equal(b) for a, b in zip(small, want, strict=True))


# --- on a mesh ---

R, ROWS, COLUMNS, SUM = Replicate(), Shard(0), Shard(1), Partial()
CUTS = {  # mesh: how x and w lie
    "dp=2": ([ROWS], [R]),
    "tp=2": ([R], [COLUMNS]),
    "cp=2": ([COLUMNS], [ROWS]),  # the summed dim
    "dp=2,tp=2": ([ROWS, R], [R, COLUMNS]),
    "dp=2,cp=2,tp=2": ([ROWS, R, COLUMNS], [R, R, ROWS]),
}


def on_mesh(
    name: str, mesh_text: str, pending: bool = False
) -> tuple[list[Tensor], CollectiveCounter]:
    """y, dx and dw as full tensors. ``pending``: the gradient of y is a pending sum of two equal
    halves."""
    x_lies, w_lies = CUTS[mesh_text]
    x, w, g = operands(256, 256, 256)
    with simulated(MeshShape.parse(mesh_text)) as mesh:
        x, w = shard(x, mesh, x_lies).requires_grad_(), shard(w, mesh, w_lies).requires_grad_()
        # torch 2.14 takes the all-reduce of a pending gradient for hidden communication.
        unguarded = pending and torch.__version__ >= "2.14"
        guard = nullcontext() if unguarded else no_hidden_communication()
        with CollectiveCounter(mesh) as counter, guard:
            y = converted(name)(x, w)
            g = shard_like(g, y)
            if pending:
                g = DTensor.from_local(g.to_local() / 2, mesh, [SUM], run_check=False)
            grads = torch.autograd.grad(y, (x, w), g)
        return [full(t.detach()) for t in (y, *grads)], counter


def one_device(name: str) -> list[Tensor]:
    return products(converted(name), *operands(256, 256, 256))


@pytest.mark.parametrize("mesh", CUTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_sharded_product_is_that_of_one_device(name, mesh):
    """No rank knows the largest value of another rank, and nothing is communicated."""
    got, counter = on_mesh(name, mesh)
    assert not counter.count
    assert all(error(a, b) < 1e-4 for a, b in zip(got, one_device(name), strict=True))


def test_the_gradient_of_a_pending_sum_may_itself_be_one():
    """The pending sum is reduced first."""
    got, counter = on_mesh("tensorwise", "cp=2", pending=True)
    assert [c.kind for c in counter.order] == ["all_reduce"]
    assert all(error(a, b) < 1e-4 for a, b in zip(got, one_device("tensorwise"), strict=True))


@pytest.mark.parametrize(
    ("row", "column", "wrong", "mesh"),
    [
        (0, 4, R, "dp=2"),
        (1, 3, R, "tp=2"),
        (2, 2, R, "cp=2"),
        (2, 3, ROWS, "cp=2"),
        (1, 4, SUM, "dp=2,tp=2"),
    ],
)
def test_a_wrong_placement_is_noticed(monkeypatch, row, column, wrong, mesh):
    table = [list(r) for r in fp8._PLACEMENTS]
    table[row][column] = wrong
    monkeypatch.setattr(fp8, "_PLACEMENTS", table)
    assert_caught(lambda: test_a_sharded_product_is_that_of_one_device("tensorwise", mesh))


def test_a_product_that_is_not_local_is_refused():
    x, w, _ = operands(32, 32, 32)
    with (
        simulated(MeshShape(tp=2)) as mesh,
        pytest.raises(PlacementError, match="axis 0.*constrain"),
    ):
        converted("tensorwise")(shard(x, mesh, [COLUMNS]), shard(w, mesh, [R]))


DIMS = {"embed": 32, "mlp": 64, "gated": True, "bias": False, "layers": 1}


@pytest.mark.parametrize("mesh", ["tp=2", "dp=2", "dp=2,tp=2"])
def test_a_layer_is_that_of_one_device_with_the_communication_of_high_precision(mesh):
    check = partial(assert_equivalent, params=MLP, mesh=mesh, dims=DIMS, tokens=64, tolerance=1e-3)

    def layer(p, x_TD, layout):
        return mlp(p, x_TD, layout, recipe=replace(RECIPES["tensorwise"], min_weights=0))

    got, plain = check(layer), check(mlp)
    assert got.total.count == plain.total.count and got.total.bytes == plain.total.bytes
    assert all(error(got.tensors[name], plain.tensors[name]) > 0.02 for name in plain.tensors)
    if "tp" in mesh:
        assert_caught(lambda: check(layer, mutate=dropped(1)))
