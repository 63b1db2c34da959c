"""A state is saved in one format and loaded in another, on another mesh."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtron import checkpoint
from dtron.checkpoint import stored_values
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full
from dtron.distributed.simulated_ranks import paused, simulated
from dtron.errors import UserError
from dtron.mesh import Layout
from dtron.model.transformer import declare_model
from dtron.params import init
from dtron.rules import rules_for
from dtron.testing import assert_caught
from dtron.training.optim_config import OptimConfig, build_optimizer
from dtron.training.optimizer import apply_update, init_state, stored_params
from dtron.training.state_formats import values
from dtron.training.update_scalars import UpdateScalars
from dtron.tree import flat, leaves, tree_map
from tests.helpers.examples import examples
from tests.helpers.runs import MODEL
from tests.helpers.values import normal

WIDE = replace(MODEL, layers=1, embed=128, mlp=256, heads=4, kv_heads=4, head_dim=32)
SPEC = declare_model(WIDE)
FORMATS = list(product(["float32", "bfloat16", "float8"], ["float32", "split"]))


def fresh(form: tuple[str, str], layout: Layout, seed: int, ema: float = 0.0):
    optim = OptimConfig(moments=form[0], master_weights=form[1], ema=ema)
    params = init(SPEC, WIDE.dims(), seed, layout)
    optimizer = build_optimizer(optim)
    state = init_state(optimizer, SPEC, params)
    return checkpoint.TrainState(0, 0, stored_params(params, SPEC, state), state), optimizer


def trained(form: tuple[str, str], layout: Layout) -> checkpoint.TrainState:
    """A state after two updates."""
    state, optimizer = fresh(form, layout, 0)
    params, opt = state.params, state.opt
    for step in range(2):
        with paused():  # all ranks must draw the same gradients
            whole = tree_map(lambda w, s=step: normal(*w.shape, seed=s).float().detach(), SPEC)
        grads = tree_map(lambda w, g: layout.shard(g, *w.axes), SPEC, whole)
        params, opt = apply_update(optimizer, SPEC, params, grads, opt, UpdateScalars(0.1), layout)
    return replace(state, params=params, opt=opt)


def numbers(state: checkpoint.TrainState) -> dict[str, torch.Tensor]:
    params, trees = values(SPEC, state.params, state.opt.trees)
    named = {"params": params, **trees}
    return {f"{kind}.{path}": full(x) for kind, t in named.items() for path, x in leaves(t)}


def converted(folder: Path, saved, mesh: str, loaded, other: str) -> None:
    """The numbers are the same where the new format has them, and else near."""
    with simulated(MeshShape.parse(mesh)) as devices:
        before = trained(saved, Layout(devices, rules_for(3)))
        want = numbers(before)
        path = checkpoint.save(folder, before, SPEC, {})
    with simulated(MeshShape.parse(other)) as devices:
        after, _ = fresh(loaded, Layout(devices, rules_for(1)), 1)
        got = numbers(checkpoint.load(path, after, SPEC, {}))
    assert want.keys() == got.keys()
    bits = {"float32": 24, "bfloat16": 8, "float8": 4}
    for name, x in want.items():
        if name.startswith("params") or bits[loaded[0]] >= bits[saved[0]] or x.ndim < 2:
            assert x.equal(got[name]), name
        else:
            assert (x - got[name]).norm() <= 2 ** -bits[loaded[0]] * 2 * x.norm(), name


MESHES = ["dp=2,tp=2", "dp=4", "tp=2", ""]


@settings(max_examples=examples(12), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    saved=st.sampled_from(FORMATS),
    loaded=st.sampled_from(FORMATS),
    mesh=st.sampled_from(MESHES),
    other=st.sampled_from(MESHES),
)
def test_any_format_loads_as_any_other(tmp_path_factory, saved, loaded, mesh, other):
    converted(tmp_path_factory.mktemp("run"), saved, mesh, loaded, other)


def test_wrong_conversions_are_caught(tmp_path, monkeypatch):
    ways = [("float8", "split"), ("float32", "float32")]
    converted(tmp_path / "right", ways[0], "dp=2,tp=2", ways[1], "tp=2")
    for name, wrong in {
        "join": lambda high, low: high.float(),
        "scaled": lambda data, exponents, root: data.float(),
    }.items():
        with monkeypatch.context() as m:
            m.setattr(stored_values, name, wrong)
            folder = tmp_path / name
            assert_caught(lambda to=folder: converted(to, ways[0], "dp=2", ways[1], "tp=2"))


def test_an_average_begins_as_split_weights(tmp_path):
    before = trained(("bfloat16", "split"), Layout())
    path = checkpoint.save(tmp_path, before, SPEC, {})
    after, _ = fresh(("float32", "float32"), Layout(), 1, ema=0.9)
    after = checkpoint.load(path, after, SPEC, {})
    for x, y in zip(flat(after.params), flat(after.opt.trees["ema"]), strict=True):
        assert x.equal(y)
    whole = numbers(before)
    loaded = checkpoint.load_params(path, SPEC, Layout(), torch.float32, "cpu")
    assert all(whole[f"params.{p}"].equal(x) for p, x in leaves(loaded))


def test_a_missing_state_is_named(tmp_path):
    state, _ = fresh(("float32", "float32"), Layout(), 0)
    path = checkpoint.save(
        tmp_path,
        replace(state, opt=replace(state.opt, trees={"m": state.opt.trees["m"]})),
        SPEC,
        {},
    )
    with pytest.raises(UserError, match=r"has no v\."):
        checkpoint.load(path, fresh(("float8", "split"), Layout(), 0)[0], SPEC, {})
