"""The proofs of toy_optimizers.py: two optimizers in one file compute the same on any mesh."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings

from dtron.distributed.mesh_shape import MeshShape
from dtron.mesh import Layout
from dtron.model.transformer import declare_model
from dtron.params import init
from dtron.runtime.config import DataConfig, OptimConfig, PipelineConfig, RunConfig
from dtron.testing import assert_caught, meshes, zero_stages
from dtron.tools import verify
from dtron.training.optim_config import build_optimizer
from dtron.training.optimizer import apply_update, init_state, with_compute_copies
from dtron.training.update_scalars import UpdateScalars
from dtron.tree import flat, tree_map
from tests.helpers.examples import examples
from tests.helpers.runs import MODEL, on_pool, simulate, train
from tests.helpers.values import F64, ONE, assert_steps_of_torch, normal
from tests.moe.test_moe_training import SPARSE
from tests.training.toy_optimizers import BOTH, SGD, NoMomentum, registered

pytestmark = pytest.mark.usefixtures("toy_optimizers")


# ---- what it computes


def steps_of_torch(optimizer: SGD) -> None:
    """Five steps of one block are the steps of torch.optim.SGD."""
    model = replace(MODEL, qkv_bias=True, bias=True)
    assert_steps_of_torch(optimizer, model, torch.optim.SGD, momentum=0.8)


@pytest.mark.parametrize("compile", [False, True])
def test_it_is_that_of_torch(compile):
    kind = lambda o: o.compiled("aot_eager") if compile else o
    steps_of_torch(kind(SGD(weight_decay=0.3, momentum=0.8)))
    assert_caught(lambda: steps_of_torch(kind(NoMomentum(weight_decay=0.3, momentum=0.8))))


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("compile", [False, True])
def test_copies_follow_and_a_step_that_is_not_finite_moves_nothing(name, compile):
    spec, optimizer = declare_model(MODEL), build_optimizer(OptimConfig(name=name))
    optimizer = optimizer.compiled("aot_eager") if compile else optimizer
    params = init(spec, MODEL.dims(), 0, ONE)
    state = init_state(optimizer, spec, params)
    state = with_compute_copies(state, params, spec, torch.bfloat16)
    tensors = flat((params, *state.trees.values(), state.compute_copies))  # overwritten in place
    for number in range(3):
        before = [x.clone() for x in tensors]
        draw = lambda w, number=number: normal(*w.shape, seed=number).bfloat16().detach()
        grads, ok = tree_map(draw, params), torch.tensor(number != 1)
        if number == 1:
            grads = tree_map(lambda g: g * torch.nan, grads)
        scalars = UpdateScalars(0.5, 0.7, ok)
        params, state = apply_update(optimizer, spec, params, grads, state, scalars, ONE)
        assert state.step == number + 1
        assert all(a.equal(b) == (number == 1) for a, b in zip(before, tensors, strict=True))
        copies = flat(state.compute_copies)
        assert all(c.equal(w.bfloat16()) for c, w in zip(copies, flat(params), strict=True))


@pytest.mark.parametrize("name", ["adamw", *BOTH])
def test_numbers_may_be_tensors(name):
    """As in a CUDA graph, whose kernels read the learning rate and the step number from the
    device."""
    spec, optimizer = declare_model(MODEL), build_optimizer(OptimConfig(name=name))
    found = []
    for number in (float, lambda x: torch.tensor(x, dtype=F64)):
        params = init(spec, MODEL.dims(), 0, ONE)
        state = init_state(optimizer, spec, params)
        for step in (1, 2):
            grads = tree_map(lambda w: normal(*w.shape).float().detach(), params)
            scalars = UpdateScalars(number(0.1), number(0.7), step=number(step))
            kernel = optimizer.compiled("eager")
            params, state = apply_update(kernel, spec, params, grads, state, scalars, ONE)
        found.append(flat((params, *state.trees.values())))
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


# ---- on any mesh


def config(name: str, **changes: Any) -> RunConfig:
    optim = OptimConfig(name=name, options="momentum=0.8")
    base = RunConfig(model=MODEL, data=DataConfig(seq_len=16), batch=8, steps=3, seed=3)
    return replace(base, optim=optim, **changes)


def one_step_agrees(name: str, mesh: str, zero: int, mutant: str | None = None) -> None:
    """``dtron verify`` compares gradients, weights and the optimizer's state."""
    c = config(name, mesh=mesh, zero=zero, batch=12)
    want = verify.one_step(verify.on_one_device(c), MeshShape())
    if mutant:
        c = replace(c, optim=replace(c.optim, name=mutant))
    loss, rows = verify.compare(want, verify.one_step(c, MeshShape.parse(mesh)))
    assert loss <= verify.TOLERANCE and all(row.same for row in rows)
    assert list(want.state) == ["momentum"]


def _divides_heads(mesh: str) -> bool:
    return MODEL.kv_heads % MeshShape.parse(mesh).tp == 0


@pytest.mark.parametrize("name", BOTH)
@settings(max_examples=examples(3))
@given(mesh=meshes(max_ranks=4).filter(_divides_heads), zero=zero_stages())
@example("dp=3", 0)
@example("dp=2,tp=2", 3)
def test_one_step_on_any_mesh(name, mesh, zero):
    one_step_agrees(name, mesh, zero)


@pytest.mark.parametrize(("name", "mutant"), zip(BOTH, ("shard-mean", "shard-norm"), strict=True))
def test_an_update_that_depends_on_sharding_is_seen(name, mutant):
    one_step_agrees(name, "dp=3", 3)
    assert_caught(lambda: one_step_agrees(name, "dp=3", 3, mutant))


def agree(got: tuple[list[float], list[float]], want: tuple[list[float], list[float]]) -> None:
    """Compare losses and gradient norms. The third loss depends on weights and state after two
    updates."""
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, rel=1e-9)


STEPS = [
    ("dp=2,tp=2", {"zero": 1}),
    ("dp_replicate=2,dp=2", {"zero": 2, "micro_batch": 1}),
    ("dp=4", {"zero": 3}),
    ("cp=2,tp=2", {"zero": 3}),
    ("dp=4,ep=4", {"zero": 3, "model": SPARSE}),
    ("dp=2,tp=2,ep=2,etp=2", {"zero": 1, "model": SPARSE}),
    ("pp=2,dp=2", {"pipeline": PipelineConfig(schedule="1f1b")}),
    (
        "pp=2,tp=2",
        {"pipeline": PipelineConfig(schedule="zb-h1"), "model": replace(MODEL, tied=True)},
    ),
]


def expected(c: RunConfig) -> tuple[list[float], list[float]]:
    """The losses and norms of one device. The auxiliary loss of experts is of the global batch, so
    microbatches do not matter."""
    return _expected(replace(c, mesh="", zero=1, pipeline=PipelineConfig(), micro_batch=None))


@cache
def _expected(c: RunConfig) -> tuple[list[float], list[float]]:
    history = train(Layout(), MeshShape(), c, F64)
    assert history.losses[-1] != history.losses[0]
    return history.losses, history.norms


# An elementwise optimizer communicates nothing, so three meshes are enough.
OF_BOTH = [
    *(("normalized-sgd", *step) for step in STEPS),
    *(("my-sgd", *STEPS[i]) for i in (0, 4, 7)),
]


@pytest.mark.parametrize(("name", "mesh", "changes"), OF_BOTH)
def test_three_steps_on_simulated_ranks(name, mesh, changes):
    c = config(name, mesh=mesh, **changes)
    got = simulate(mesh, c, F64)
    agree((got.losses, got.norms), expected(c))


def steps_on_pool(mesh: str, c: RunConfig) -> tuple[list[float], list[float]]:
    """A job for the pool: losses and norms of three steps."""
    with registered():
        return on_pool(mesh, c, F64)[:2]


@pytest.mark.xdist_group("pool")
@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(("mesh", "zero"), [("dp=2,tp=2", 3), ("pp=2,dp=2", 1)])
def test_three_steps_on_real_ranks(pool, name, mesh, zero):
    c = config(name, mesh=mesh, zero=zero)
    for got in pool.run(steps_on_pool, mesh, c):
        agree(got, expected(c))
