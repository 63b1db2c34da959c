"""Muon, Lion and SGD: what torch computes, and the same on any mesh."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

import train as program
from dtron import checkpoint
from dtron.checkpoint import TrainState
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import simulated
from dtron.mesh import Layout
from dtron.model.transformer import declare_model
from dtron.params import init
from dtron.rules import rules_for
from dtron.runtime.config import DataConfig, OptimConfig, PipelineConfig, RunConfig
from dtron.runtime.exit import run_cli
from dtron.testing import assert_caught, meshes, zero_stages
from dtron.tools import verify
from dtron.tools.count_collectives import CollectiveCounter
from dtron.training.linear_weight import LinearWeight, is_matrix
from dtron.training.lion import Lion
from dtron.training.matrix_exchange import Exchange, Slots
from dtron.training.muon import Muon
from dtron.training.optim_config import build_optimizer
from dtron.training.optimizer import apply_update, init_state
from dtron.training.sgd import SGD
from dtron.training.update_scalars import UpdateScalars
from dtron.tree import flat, tree_map
from tests.checkpoint.test_checkpoint import built, differences
from tests.helpers.examples import examples
from tests.helpers.runs import MODEL, on_pool, simulate, train
from tests.helpers.values import F64, ONE, assert_steps_of_torch, normal
from tests.moe.test_moe_training import SPARSE
from tests.training.test_optimizer_seam_runs import FLAGS, losses

OURS = Muon(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.3)


# ---- what it computes


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24)])
@pytest.mark.parametrize("compile", [False, True])
def test_a_matrix_moves_as_in_torch(nesterov, shape, compile):
    """``torch.optim.Muon`` iterates in bfloat16, and Muon here in float32 on a CPU."""
    spec = declare_model(replace(MODEL, embed=shape[0], mlp=shape[1])).blocks[0].mlp.w_up
    assert spec.shape == shape and is_matrix(spec)
    w = torch.nn.Parameter(normal(*shape).float().detach())
    theirs = torch.optim.Muon(
        [w],
        lr=0.1,
        weight_decay=0.3,
        momentum=0.9,
        nesterov=nesterov,
        adjust_lr_fn="match_rms_adamw",
    )
    ours = replace(OURS, momentum=0.9, nesterov=nesterov)
    ours = ours.compiled("aot_eager") if compile else ours
    params = (w.detach().clone(),)
    state = init_state(ours, (spec,), params)
    for step in range(4):
        g = normal(*shape, seed=step).float().detach()
        w.grad = 0.7 * g
        theirs.step()
        params, state = apply_update(
            ours, (spec,), params, (g,), state, UpdateScalars(0.1, 0.7), ONE
        )
        moved = (w.detach() - params[0]).norm() / (0.1 * 0.2 * max(shape) ** 0.5)
        assert moved < 0.05 * min(shape) ** 0.5  # torch's rounding


def test_each_head_is_a_matrix():
    """Singular values of the update of each head are about 1, and of the whole weight they are
    not."""
    block = declare_model(replace(MODEL, embed=12, heads=3, kv_heads=3, head_dim=4)).blocks[0]
    for spec in (block.mixer.w_q, block.mixer.w_o):
        x = LinearWeight(spec, *[normal(*spec.shape).detach()] * 3, None, per_head=True)
        (update,) = x.orthogonalized(x.weight[None], 5)
        heads = update.movedim(spec.axes.index("heads"), 0)
        values = torch.linalg.svdvals(heads.reshape(3, x.rows, x.columns))
        assert ((values > 0.6) & (values < 1.3)).all()
        whole = replace(x, per_head=False)
        flattened = update.reshape(whole.rows, whole.columns)
        assert (torch.linalg.svdvals(flattened) > 1.3).any()


def test_which_weights_are_matrices():
    model = replace(SPARSE, tied=False)
    paths = {w.path.rpartition(".")[2] for w in flat(declare_model(model)) if is_matrix(w)}
    assert paths == {"w_q", "w_k", "w_v", "w_o", "w_gate", "w_up", "w_down"}
    others = {w.path for w in flat(declare_model(model)) if not is_matrix(w)}
    assert {path for path in others if "router" in path or "tokens" in path}


def lion_of_the_paper(w, g, m, lr):
    """Algorithm 2 of arXiv:2302.06675, with its variable names."""
    c = 0.9 * m + 0.1 * g
    return w - lr * (c.sign() + 0.3 * w), 0.95 * m + 0.05 * g


def test_lion_is_that_of_its_paper():
    spec = declare_model(MODEL).blocks[0].mlp.w_up
    ours, w = Lion(0.9, 0.95, 0.3), normal(*spec.shape).detach()
    params, m = (w.clone(),), torch.zeros_like(w)
    state = init_state(ours, (spec,), params)
    for step in range(4):
        g = normal(*spec.shape, seed=step).detach()
        w, m = lion_of_the_paper(w, g, m, 0.1)
        params, state = apply_update(ours, (spec,), params, (g,), state, UpdateScalars(0.1), ONE)
        torch.testing.assert_close(params[0], w)
        torch.testing.assert_close(state.trees["m"][0], m)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_that_of_torch(nesterov):
    model = replace(MODEL, qkv_bias=True, bias=True)
    ours = SGD(weight_decay=0.3, momentum=0.8, nesterov=nesterov)
    assert_steps_of_torch(ours, model, torch.optim.SGD, momentum=0.8, nesterov=nesterov)


# ---- on any mesh


def config(name: str = "muon", **changes: Any) -> RunConfig:
    base = RunConfig(model=MODEL, data=DataConfig(seq_len=16), batch=12, steps=3, seed=3)
    return replace(base, optim=OptimConfig(name=name), **changes)


def one_step_agrees(c: RunConfig, mesh: str, mutant: Any = None) -> None:
    want = verify.one_step(verify.on_one_device(c), MeshShape())
    with mutant or nullcontext():
        got = verify.one_step(replace(c, mesh=mesh), MeshShape.parse(mesh))
    loss, rows = verify.compare(want, got)
    assert loss <= verify.TOLERANCE and all(row.same for row in rows)


@settings(max_examples=examples(2, thorough=60))
@given(
    mesh=meshes(8, ("dp_replicate", "dp", "cp", "tp")).filter(
        lambda mesh: (
            MODEL.kv_heads % MeshShape.parse(mesh).tp == 0
            and "cp=3" not in mesh
            and config().batch % MeshShape.parse(mesh).data == 0
        )
    ),
    zero=zero_stages(),
)
@example("dp=3,tp=2", 3)
@example("dp=2,cp=2", 1)
def test_one_step_on_any_mesh(mesh, zero):
    one_step_agrees(config(zero=zero), mesh)


def not_sent() -> Any:
    """A mutant: the results of the second slot are lost."""

    def lost(self: Exchange, whole: Tensor, slots: Slots) -> list[Tensor]:
        return TO_SHARDS(self, torch.cat([whole[:1], 0 * whole[1:]]), slots)

    return mock.patch.object(Exchange, "to_shards", lost)


def each_on_its_shard() -> Any:
    """A mutant: every rank orthogonalises its own shard."""
    return mock.patch.multiple(
        Exchange,
        to_owners=lambda self, shards, slots: torch.stack([*shards]),
        to_shards=lambda self, whole, slots: [*whole.unbind()],
    )


def in_wrong_order() -> Any:
    """A mutant: a rank takes the results of another matrix."""
    turned = lambda self, whole, slots: TO_SHARDS(self, whole, slots)[::-1]
    return mock.patch.object(Exchange, "to_shards", turned)


TO_SHARDS = Exchange.to_shards


@pytest.mark.parametrize("mutant", [not_sent, each_on_its_shard, in_wrong_order])
def test_a_wrong_exchange_is_seen(mutant):
    one_step_agrees(config(zero=3), "dp=2")
    assert_caught(lambda: one_step_agrees(config(zero=3), "dp=2", mutant()))


STEPS = [
    ("dp=2,tp=2", {"zero": 1, "optim": OptimConfig(name="muon", options="per_head=true")}),
    ("dp_replicate=2,dp=2", {"zero": 2, "micro_batch": 1}),
    ("cp=2,tp=2", {"zero": 3}),
    ("dp=4,ep=2", {"zero": 3, "model": SPARSE}),
    ("dp=2,tp=2,ep=2,etp=2", {"zero": 1, "model": SPARSE}),
    ("pp=2,dp=2", {"pipeline": PipelineConfig(schedule="1f1b")}),
    (
        "pp=2,tp=2",
        {"pipeline": PipelineConfig(schedule="zb-h1"), "model": replace(MODEL, tied=True)},
    ),
]


@cache
def expected(c: RunConfig) -> tuple[list[float], list[float]]:
    history = train(Layout(), MeshShape(), c, F64)
    return history.losses, history.norms


def agree(got: tuple[list[float], list[float]], c: RunConfig) -> None:
    alone = replace(c, mesh="", zero=1, pipeline=PipelineConfig(), micro_batch=None)
    for a, b in zip(got, expected(alone), strict=True):
        assert a == pytest.approx(b, rel=1e-9)


@pytest.mark.parametrize(("mesh", "changes"), STEPS)
def test_three_steps_on_simulated_ranks(mesh, changes):
    c = replace(config(mesh=mesh, batch=8), **changes)
    got = simulate(mesh, c, F64)
    agree((got.losses, got.norms), c)


def steps_on_pool(mesh: str, c: RunConfig) -> tuple[list[float], list[float]]:
    """A job for the pool: losses and norms of three steps."""
    return on_pool(mesh, c, F64)[:2]


@pytest.mark.xdist_group("pool")
@pytest.mark.parametrize(("mesh", "zero"), [("dp=2,tp=2", 3), ("pp=2,dp=2", 1)])
def test_three_steps_on_real_ranks(pool, mesh, zero):
    c = config(mesh=mesh, zero=zero, batch=8)
    for got in pool.run(steps_on_pool, mesh, c):
        agree(got, c)


@pytest.mark.parametrize("name", ["lion", "sgd"])
def test_elementwise_optimizers_on_a_mesh(name):
    one_step_agrees(config(name, zero=3), "dp=2,tp=2")


def test_one_exchange_for_each_kind_of_matrix(monkeypatch):
    """Not one for each matrix: the kinds of a block are w_q with w_k and w_v, w_o, w_up with
    w_gate, and w_down."""
    kinds, to_owners = [], Exchange.to_owners

    def counted(self, shards, slots):
        kinds.append(len(shards))
        return to_owners(self, shards, slots)

    monkeypatch.setattr(Exchange, "to_owners", counted)
    verify.one_step(config(mesh="dp=2", zero=3), MeshShape.parse("dp=2"))
    assert sorted(kinds) == [2, 2, 4, 6] and MODEL.layers == 2


@pytest.mark.parametrize(
    ("mesh", "zero", "collectives"),
    [
        ("dp=2", 3, {("all_to_all", "dp"): 8}),
        ("dp=2,tp=2", 1, {("all_to_all", "dp"): 8, ("all_to_all", "tp"): 8}),
        ("dp=2", 0, {("all_gather", "dp"): 4}),
    ],
)
def test_the_collectives_of_an_update(mesh, zero, collectives):
    """Each of four kinds of matrices goes to its owners and back. An axis that replicates weights
    sends nothing on the way there."""
    spec = declare_model(MODEL)
    with simulated(MeshShape.parse(mesh)) as devices:
        layout = Layout(devices, rules_for(zero))
        params = init(spec, MODEL.dims(), 0, layout)
        state = init_state(OURS, spec, params)
        with CollectiveCounter(devices) as counter:
            apply_update(OURS, spec, params, params, state, UpdateScalars(0.1), layout)
    assert Counter((c.kind, c.axis) for c in counter.order) == collectives


# ---- its state


def test_state_moves_to_another_mesh_to_the_bit(tmp_path):
    saved, loaded = ("dp=2,tp=2", 3, "1f1b"), ("pp=2,tp=2", 1, "zb-v")
    with simulated(MeshShape.parse(saved[0])) as mesh:
        spec, state = built(saved, None, mesh, False, ("m",))
        checkpoint.save(tmp_path, state, spec, {})
    with simulated(MeshShape.parse(loaded[0])) as mesh:
        assert differences(loaded, None, mesh, str(tmp_path), ("m",)) == []


def test_a_run_goes_on_with_muon_and_not_back(tmp_path, capsys):
    """The first moment of AdamW is Muon's momentum. Muon has no second moment of matrices."""
    losses(tmp_path / "run", "--steps=2")
    goes_on = ["--steps=3", "--resume", "--optim.name=muon"]
    assert len(losses(tmp_path / "run", *goes_on)) == 3
    assert "--optim.name: adamw -> muon" in capsys.readouterr().out
    shared = [*FLAGS, f"--data.path={tmp_path / 'text.txt'}", f"--run-dir={tmp_path / 'run'}"]
    assert run_cli(program.main, [*shared, "--steps=4", "--resume", "--optim.name=adamw"]) == 2
    error = capsys.readouterr().err
    assert "was made with optim.name=muon, this run has adamw; use --optim.name muon" in error


def test_muon_begins_with_the_moments_of_adamw(tmp_path):
    spec = declare_model(MODEL)
    params = init(spec, MODEL.dims(), 0, ONE)
    adamw = init_state(build_optimizer(OptimConfig()), spec, params)
    for i, x in enumerate(flat(adamw.trees["m"])):
        x.fill_(i + 1)
    path = checkpoint.save(tmp_path, TrainState(1, 8, params, adamw), spec, {"optim.name": "adamw"})
    ours = TrainState(0, 0, params, init_state(OURS, spec, params))
    loaded = checkpoint.load(path, ours, spec, {"optim.name": "muon"})
    assert all((x == i + 1).all() for i, x in enumerate(flat(loaded.opt.trees["m"])))


def test_half_the_state_of_adamw():
    spec = declare_model(MODEL)
    ours, adamw = OURS, build_optimizer(OptimConfig())
    params = init(spec, MODEL.dims(), 0, ONE)
    for optimizer in (ours, adamw):
        trees = optimizer.init(spec, params)
        held = sum(x.nbytes for tree in trees.values() for x in flat(tree))
        assert held == sum(optimizer.state_bytes(w, w.shape, 4) for w in flat(spec))
    matrices = sum(w.numel for w in flat(spec) if is_matrix(w))
    assert 4 * matrices == sum(
        adamw.state_bytes(w, w.shape, 4) - ours.state_bytes(w, w.shape, 4) for w in flat(spec)
    )


def test_a_step_that_is_not_finite_moves_nothing():
    spec = declare_model(MODEL)
    params = init(spec, MODEL.dims(), 0, ONE)
    state = init_state(OURS, spec, params)
    before = [x.clone() for x in flat((params, *state.trees.values()))]
    grads = tree_map(lambda w: w * torch.nan, params)
    scalars = UpdateScalars(0.5, 0.7, torch.tensor(False))
    params, state = apply_update(OURS, spec, params, grads, state, scalars, ONE)
    after = flat((params, *state.trees.values()))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert state.step == 1
