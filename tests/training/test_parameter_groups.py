"""Groups of weights with other options: what torch computes, on any mesh, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from dtron.distributed.mesh_shape import MeshShape
from dtron.model.transformer import declare_model
from dtron.params import init
from dtron.runtime.cli import parse
from dtron.runtime.config import DataConfig, OptimConfig, RunConfig
from dtron.runtime.exit import run_cli
from dtron.runtime.launch import plan_run
from dtron.testing import assert_caught
from dtron.tools import show, verify
from dtron.training.optim_config import build_optimizer
from dtron.training.optimizer import apply_update, init_state
from dtron.training.parameter_groups import Group, ParameterGroups, check_groups, describe_groups
from dtron.training.update_scalars import UpdateScalars
from dtron.tree import flat, leaves, tree_map
from tests.helpers.runs import MODEL
from tests.helpers.texts import one_line
from tests.helpers.values import ONE, assert_steps_of_torch_in_groups, normal

GROUPS = "vocab: lr=0.5x, beta2=0.9; blocks.0.*: lr=0.1x; *.w_up: weight_decay=0.7, lr=3x"


def options_of(path: str) -> dict[str, float]:
    """What GROUPS says of a weight, in the words of torch."""
    name = path.rpartition(".")[2]
    decay = 0.7 if name == "w_up" else 0.1 if name.startswith("w_") else 0.0
    rate = (0.1 if path.startswith("blocks.0.") else 1.0) * (3 if name == "w_up" else 1)
    vocab = name in ("w_tokens", "w_head")
    return {
        "rate": rate * (0.5 if vocab else 1),
        "beta2": 0.9 if vocab else 0.95,
        "weight_decay": decay,
    }


def steps_of_torch(groups: str, compile: bool) -> None:
    optimizer = build_optimizer(OptimConfig(groups=groups))
    assert_steps_of_torch_in_groups(optimizer, replace(MODEL, layers=2), options_of, compile)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compile", [False, True])
def test_groups_are_those_of_torch(compile):
    steps_of_torch(GROUPS, compile)
    assert_caught(lambda: steps_of_torch(GROUPS.replace("0.1x", "0.2x"), compile))


def one_step_agrees(optim: OptimConfig, mesh: str) -> None:
    c = RunConfig(model=MODEL, data=DataConfig(seq_len=16), batch=12, seed=3, optim=optim)
    want = verify.one_step(verify.on_one_device(c), MeshShape())
    got = verify.one_step(replace(c, mesh=mesh, zero=3), MeshShape.parse(mesh))
    loss, rows = verify.compare(want, got)
    assert loss <= verify.TOLERANCE and all(row.same for row in rows)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_on_a_mesh(name):
    one_step_agrees(OptimConfig(name=name, groups=GROUPS), "dp=2,tp=2")


def test_groups_of_muon_are_updated_apart():
    """Only the first block's matrices have a rate, and they alone move."""
    spec = declare_model(MODEL)
    params = init(spec, MODEL.dims(), 0, ONE)
    optimizer = build_optimizer(OptimConfig(name="muon", groups="*: lr=0x; blocks.1.*: lr=1x"))
    assert isinstance(optimizer, ParameterGroups)
    rates = {w.path: optimizer.group(w).rate for w in flat(spec)}
    assert set(rates.values()) == {0.0}  # factors are multiplied
    optimizer = build_optimizer(OptimConfig(name="muon", groups="blocks.0.*: lr=0x"))
    before = {path: w.clone() for path, w in leaves(params)}
    state = init_state(optimizer, spec, params)
    grads = tree_map(lambda w: normal(*w.shape).float().detach(), params)
    apply_update(optimizer, spec, params, grads, state, UpdateScalars(0.1), ONE)
    for path, w in leaves(params):
        assert torch.equal(w, before[path]) == path.startswith("blocks.0.")


def test_without_groups_nothing_is_wrapped():
    assert not isinstance(build_optimizer(OptimConfig()), ParameterGroups)
    assert describe_groups(build_optimizer(OptimConfig()), declare_model(MODEL)) == []


def test_the_state_is_that_of_the_optimizer():
    spec = declare_model(MODEL)
    params = init(spec, MODEL.dims(), 0, ONE)
    plain, grouped = (build_optimizer(OptimConfig(groups=g)) for g in ("", GROUPS))
    shapes = lambda o: {n: [x.shape for x in flat(t)] for n, t in o.init(spec, params).items()}
    assert shapes(plain) == shapes(grouped)
    assert all(
        plain.state_bytes(w, w.shape, 4) == grouped.state_bytes(w, w.shape, 4) for w in flat(spec)
    )


@pytest.mark.parametrize(
    ("groups", "parts"),
    [
        ("vocab", ["optim.groups='vocab'", "OPTION=VALUE", "change it"]),
        ("vocab: lr=0.5", ["lr must be a factor", "0.5x", "'0.5'"]),
        ("vocab: lr=-1x", ["lr must be a factor"]),
        ("vocab: lr=nanx", ["lr must be a factor"]),
        ("vocab: beta3=0.5", ["adamw has no option 'beta3'", "beta1, beta2, eps, weight_decay"]),
        ("vocab: beta1=x", ["beta1 must be a float, not 'x'"]),
        ("vocab: beta1=1", ["optim.beta1=1.0", "under 1"]),
    ],
)
def test_a_row_that_cannot_be_is_one_line(groups, parts):
    one_line(lambda: OptimConfig(groups=groups), *parts)
    one_line(lambda: parse([f"--optim.groups={groups}"]), *parts)


def test_a_row_that_names_no_weight_is_refused():
    for name, near in (("experts", "heads"), ("w_ups", "*.w_up"), ("vocb", "vocab")):
        config = RunConfig(optim=OptimConfig(groups=f"{name}: lr=0.5x"))
        one_line(lambda c=config: plan_run(c), f"optim.groups: {name!r}", f"did you mean {near}?")
    check_groups(build_optimizer(OptimConfig(groups=GROUPS)), declare_model(MODEL))


def test_show_lists_the_groups(capsys):
    flags = ["--model.layers=2", "--mesh=dp=2", f"--optim.groups={GROUPS}"]
    assert run_cli(show.main, flags) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "optimizer group lr=0.5x, beta2=0.9: 2 weights" in out
    assert "optimizer group lr=0.3x, weight_decay=0.7: 1 weights" in out


def test_a_group_that_is_mixed_up_is_seen():
    """A mutant: on a mesh, the groups are dealt in another order."""
    wrong = lambda self, w: Group(self.base, 2.0 if "w_up" in w.path else 1.0)
    want = OptimConfig(groups=GROUPS)
    c = RunConfig(model=MODEL, data=DataConfig(seq_len=16), batch=12, seed=3, optim=want)
    right = verify.one_step(verify.on_one_device(c), MeshShape())
    with mock.patch.object(ParameterGroups, "group", wrong):
        got = verify.one_step(replace(c, mesh="dp=2"), MeshShape.parse("dp=2"))
    _, rows = verify.compare(right, got)
    assert not all(row.same for row in rows)
