"""Optimizer state and master weights in few bits: right on average, lossless where they say so, and
the same on every mesh."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dtron.distributed.mesh_shape import MeshShape
from dtron.model.transformer import declare_model
from dtron.params import init
from dtron.runtime.cli import parse
from dtron.runtime.config import DataConfig, OptimConfig, RunConfig
from dtron.runtime.exit import run_cli
from dtron.runtime.launch import plan_run
from dtron.testing import assert_caught
from dtron.tools import show, verify
from dtron.training import state_formats, stochastic_rounding
from dtron.training.low_bit_state import block_dim
from dtron.training.optim_config import build_optimizer
from dtron.training.optimizer import (
    apply_update,
    init_state,
    stored_params,
    with_compute_copies,
)
from dtron.training.state_formats import (
    BLOCK,
    Stored,
    join,
    load,
    split,
    values,
    write,
)
from dtron.training.stochastic_rounding import random_bits
from dtron.training.update_scalars import UpdateScalars
from dtron.tree import flat, leaves, tree_map
from tests.helpers.examples import examples
from tests.helpers.runs import MODEL
from tests.helpers.texts import one_line
from tests.helpers.values import ONE, normal
from tests.tools.test_verify import TINY

# Widths of whole blocks, on shards too.
WIDE = replace(MODEL, embed=128, mlp=256, heads=4, kv_heads=4, head_dim=32)
ONE_LAYER = replace(WIDE, layers=1)
YES = torch.tensor(True)
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


# ---- the formats


@given(xs=st.lists(FLOATS, min_size=1, max_size=20))
def test_split_numbers_are_float32_to_the_bit(xs):
    x = torch.tensor(xs)
    high, low = split(x)
    assert join(high, low).equal(x)
    # The nearest bfloat16 number: a tie may go to the other side.
    assert ((high.float() - x).abs() <= (x.bfloat16().float() - x).abs()).all()


def rounded(x: torch.Tensor, step: int, kind: str, dim: int = 1) -> torch.Tensor:
    """x as it is read after it was written at an update."""
    at = (torch.arange(x.shape[0]).int() * x.shape[1], torch.arange(x.shape[1]).int())
    random = random_bits(at, torch.tensor(float(step)), 0)
    if kind == "bfloat16":
        stored = Stored(torch.zeros(x.shape, dtype=torch.bfloat16))
    else:
        shape = [n // BLOCK if i == dim else n for i, n in enumerate(x.shape)]
        data = torch.zeros(x.shape).to(torch.float8_e4m3fn)
        stored = Stored(data, torch.zeros(shape, dtype=torch.int8), kind == "roots")
    write(stored, x, YES, random)
    once = load(stored)
    write(stored, once, YES, random_bits(at, torch.tensor(step + 1.0), 0))
    assert load(stored).equal(once)  # a number that the format has stays
    return once


def right_on_average(kind: str, dim: int = 1) -> None:
    """The mean of many writes is the number. Each is a neighbour of the number: in bfloat16 by at
    most 1/128 of it, in float8 by 1/8, or by 1/230,000 of the largest number of the block."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 96, generator=g) * torch.randn(64, 96, generator=g).exp()
    x = x.square() if kind == "roots" else x
    draws = torch.stack([rounded(x, step, kind, dim) for step in range(300)])
    if kind == "roots":  # the root is right on average
        x, draws = x.sqrt(), draws.sqrt()
    relative = 1 / 128 if kind == "bfloat16" else 1 / 8
    floor = 0 if kind == "bfloat16" else x.abs().max() / 2**17
    assert ((draws - x).abs() <= relative * x.abs() + floor).all()
    # The error of a mean of 300 draws, with 6,000 numbers: 5 standard deviations.
    error = (draws.mean(0) - x).abs()
    assert (error <= 5 * relative / 300**0.5 * x.abs() + floor).all()
    assert draws.std(0).max() > 0


@pytest.mark.parametrize(
    ("kind", "dim"), [("bfloat16", 1), ("float8", 1), ("float8", 0), ("roots", 1)]
)
def test_a_write_is_right_on_average(kind, dim, monkeypatch):
    right_on_average(kind, dim)
    truncated = lambda at, step, draw: torch.zeros(64, 96, dtype=torch.int32)
    monkeypatch.setattr(f"{__name__}.random_bits", truncated)
    assert_caught(lambda: right_on_average(kind, dim))


@example(exponent=0, mantissas=[1.0] * 11 + [1.5] + [1.0] * 19 + [1.875], drop=21)
@given(
    exponent=st.integers(-100, 60),
    mantissas=st.lists(st.floats(1, 1.9375, width=32), min_size=BLOCK, max_size=BLOCK),
    drop=st.integers(0, 30),
)
def test_a_block_of_any_size_is_near(exponent, mantissas, drop):
    x = torch.tensor([mantissas]) * 2.0**exponent
    x[0, : BLOCK // 2] *= 2.0**-drop
    y = rounded(x, 3, "float8")
    floor = x.max() / (224 * 2**9)  # a subnormal step, and the largest is scaled to over 224
    assert ((y - x).abs() <= x / 8 + floor).all() and y.isfinite().all()


def test_a_root_is_not_rounded_to_zero():
    x = torch.full((1, BLOCK), 1e-20)
    x[0, 0] = 1.0
    x[0, 1] = 0.0
    y = rounded(x, 1, "roots")
    assert y[0, 1] == 0 and (y[0, 2:] > 0).all()


def test_a_small_step_moves_a_moment_on_average():
    """0.999 v + 0.001 g^2 from v = 1 to g^2 = 0: after 500 steps v is 0.61. Rounded to the nearest
    number it stays 1."""
    at = (torch.arange(32).int() * 64, torch.arange(64).int())
    v = Stored(torch.ones(32, 64, dtype=torch.bfloat16))
    for step in range(500):
        write(v, load(v) * 0.999, YES, random_bits(at, torch.tensor(step), 0))
    assert load(v).mean().item() == pytest.approx(0.999**500, rel=0.01)
    v = torch.ones(1).bfloat16()
    assert (v.float() * 0.999).bfloat16() == v


# ---- updates


def numbers(spec, params, state) -> list[torch.Tensor]:
    weights, trees = values(spec, params, state.trees)
    return flat((weights, *trees.values()))


def steps(optim: OptimConfig, compile: bool = False, skip: int = -1, count: int = 4):
    """Some updates of a model with given gradients: params and state as numbers, and the copies
    that compute."""
    spec = declare_model(ONE_LAYER)
    params = init(spec, WIDE.dims(), 0, ONE)
    optimizer = build_optimizer(optim)
    optimizer = optimizer.compiled("aot_eager") if compile else optimizer
    state = init_state(optimizer, spec, params)
    params = stored_params(params, spec, state)
    state = with_compute_copies(state, params, spec, torch.bfloat16)
    for step in range(count):
        grads = tree_map(lambda w, step=step: normal(*w.shape, seed=step).float().detach(), params)
        before = [x.clone() for x in numbers(spec, params, state)]
        scalars = UpdateScalars(1e-2, 0.7, torch.tensor(step != skip))
        params, state = apply_update(optimizer, spec, params, grads, state, scalars, ONE)
        if step == skip:
            assert all(map(torch.equal, before, numbers(spec, params, state)))
    copies = params if state.compute_copies is None else state.compute_copies
    return *values(spec, params, state.trees), copies, state


NAMES = ["adamw", "lion", "sgd", "muon"]
HOW = [*((name, False) for name in NAMES), ("adamw", True), ("muon", True)]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("name", "compile"), HOW)
def test_split_masters_are_those_of_float32_to_the_bit(name, compile):
    # Compiled, because the kernel of torch that eager AdamW takes rounds otherwise.
    want = steps(OptimConfig(name), compile=compile or name in ("adamw", "muon"))
    got = steps(OptimConfig(name, master_weights="split"), compile)
    for of in ("params", *want[1]):
        trees = (x[0] if of == "params" else x[1][of] for x in (want, got))
        for (path, a), b in zip(leaves(next(trees)), flat(next(trees)), strict=True):
            assert torch.equal(a, b), (of, path)
    for a, b, x in zip(flat(want[2]), flat(got[2]), flat(want[0]), strict=True):
        assert b.dtype == torch.bfloat16 and ((a == b) | ((a - x).abs() == (b - x).abs())).all()


def near(optim: OptimConfig, compile: bool = False) -> None:
    """The moments are those of float32 within their bits, and so is the average update."""
    want = steps(OptimConfig(optim.name))
    got = steps(optim, compile)
    bits = 2**-8 if optim.moments == "bfloat16" else 2**-4
    for name, tree in want[1].items():
        for (path, a), b in zip(leaves(tree), flat(got[1][name]), strict=True):
            assert (a - b).norm() <= 4 * bits * a.norm(), path
    moved = lambda of: torch.cat([x.flatten() for x in flat(of[0])])
    start = torch.cat(
        [x.flatten() for x in flat(init(declare_model(ONE_LAYER), WIDE.dims(), 0, ONE))]
    )
    a, b = moved(want) - start, moved(got) - start
    assert (a - b).norm() <= 4 * bits * a.norm()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("name", "compile"), HOW)
@pytest.mark.parametrize("moments", ["bfloat16", "float8"])
def test_moments_in_few_bits_are_near_those_of_float32(moments, name, compile):
    if name == "lion":  # its update is a sign, so the weights may differ
        state = steps(OptimConfig(name, moments=moments), compile)[3]
        assert state.trees["m"].blocks[0].mlp.w_up.dtype.itemsize == 2 - (moments == "float8")
        return
    near(OptimConfig(name, moments=moments), compile)


def test_a_wrong_exponent_is_caught(monkeypatch):
    true = state_formats._exponents
    monkeypatch.setattr(state_formats, "_exponents", lambda largest: true(largest) - 5)
    assert_caught(lambda: near(OptimConfig(moments="float8")))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("moments", ["bfloat16", "float8"])
def test_a_skipped_step_changes_nothing(moments, name):
    steps(OptimConfig(name, moments=moments, master_weights="split"), skip=2)


def test_which_state_is_in_few_bits():
    optim = OptimConfig(moments="float8", master_weights="split", ema=0.9)
    _, _, _, state = steps(optim, count=1)
    block = lambda name: state.trees[name].blocks[0]
    assert block("m").mlp.w_up.dtype == torch.float8_e4m3fn
    assert block("m_scale").mlp.w_up.dtype == torch.int8
    assert block("m_scale").mlp.w_up.shape == (128, 256 // BLOCK)
    assert block("v_root_scale").mlp.w_up.shape == (128, 256 // BLOCK)
    assert block("m").norm_2.scale.dtype == torch.float32
    assert block("m_scale").norm_2.scale is None
    assert block("master_low").norm_2.scale.dtype == torch.int16
    assert block("ema").mlp.w_up.dtype == torch.float32
    assert block_dim((64, 61)) == 0 and block_dim((61, 5)) is None and block_dim((64, 96)) == 1


# ---- on meshes


def agrees(optim: OptimConfig, mesh: str, zero: int, seed: int, **more) -> None:
    c = RunConfig(
        model=WIDE, data=DataConfig(seq_len=16), batch=12, seed=seed, optim=optim, zero=zero, **more
    )
    want = verify.one_step(verify.on_one_device(c), MeshShape())
    got = verify.one_step(replace(c, mesh=mesh), MeshShape.parse(mesh))
    loss, rows = verify.compare(want, got)
    assert loss <= verify.TOLERANCE and all(row.same for row in rows)
    assert {"m"} <= want.state.keys()


MESHES = ["dp=2,tp=2", "dp=3", "dp_replicate=2,dp=2", "cp=2,tp=2", "pp=2,dp=2", "tp=4"]


@settings(max_examples=examples(2, thorough=60))
@example("muon", "pp=2,dp=2", 3, 0)
@example("adamw", "cp=2,tp=2", 1, 0)
@given(
    name=st.sampled_from(["adamw", "muon", "lion"]),
    mesh=st.sampled_from(MESHES),
    zero=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 99),
)
def test_bfloat16_moments_are_the_same_on_any_mesh(name, mesh, zero, seed):
    agrees(OptimConfig(name, moments="bfloat16"), mesh, zero, seed)


@settings(max_examples=examples(1, thorough=40))
@example("muon", "dp=2,tp=2", 3, 0)
@given(
    name=st.sampled_from(["adamw", "muon"]),
    mesh=st.sampled_from([m for m in MESHES if m != "dp=3"]),
    zero=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_float8_moments_are_the_same_on_any_mesh(name, mesh, zero, seed):
    agrees(OptimConfig(name, moments="float8"), mesh, zero, seed)


def test_random_numbers_of_a_shards_own_indices_are_caught():
    """A mutant: each rank counts the elements of its shard from 0."""
    true = stochastic_rounding.places

    def places(*args):
        return tuple(x - x[:1] for x in true(*args))

    with mock.patch("dtron.training.elementwise_optimizer.places", places):
        assert_caught(lambda: agrees(OptimConfig(moments="bfloat16"), "dp=2,tp=2", 3, 0))


def test_split_masters_on_a_mesh(capsys):
    """Within the rounding of bfloat16, on simulated ranks as in training."""
    flags = [*TINY, "--optim.master-weights=split", "--optim.moments=bfloat16"]
    assert run_cli(verify.main, [*flags, "--dtype=bfloat16"]) == 0
    capsys.readouterr()
    assert run_cli(verify.main, flags) == 2
    assert "--dtype bfloat16" in capsys.readouterr().err


# ---- flags and sizes


def test_what_is_refused():
    one_line(
        lambda: plan_run(parse(["--optim.master-weights=split", "--device=cpu"])),
        "optim.master_weights=split",
        "float32",
        "--dtype",
    )
    flags = ["--optim.moments=float8", "--device=cpu", "--simulate", "--mesh=dp=3", "--zero=3"]
    one_line(lambda: plan_run(parse([*flags, "--batch=12"])), "float8", "bfloat16")


@pytest.mark.parametrize("masters", ["float32", "split"])
@pytest.mark.parametrize("moments", ["float32", "bfloat16", "float8"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_show_counts_the_bytes_that_are_there(name, moments, masters):
    optim = OptimConfig(name, moments=moments, master_weights=masters)
    spec = declare_model(WIDE)
    params = init(spec, WIDE.dims(), 0, ONE)
    state = init_state(build_optimizer(optim), spec, params)
    params = stored_params(params, spec, state)
    state = with_compute_copies(state, params, spec, torch.bfloat16)
    size = lambda *trees: sum(x.nbytes for x in flat(trees))
    rows = show.rows(WIDE, MeshShape(), 1, optim=optim)
    assert sum(r.optimizer for r in rows) == size(*state.trees.values())
    assert sum(r.params for r in rows) == size(params, state.compute_copies)
