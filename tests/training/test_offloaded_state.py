"""The optimizer's state on the host: the update of the device, to the bit."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dtron import checkpoint
from dtron.distributed.mesh_shape import MeshShape
from dtron.model.transformer import declare_model
from dtron.params import init
from dtron.runtime import check_memory
from dtron.runtime.cli import parse
from dtron.runtime.config import DataConfig, OptimConfig, RunConfig
from dtron.runtime.launch import plan_run
from dtron.testing import assert_caught
from dtron.tools import show, verify
from dtron.training import offloaded_state
from dtron.training.optim_config import build_optimizer
from dtron.training.optimizer import apply_update, init_state, stored_params, with_compute_copies
from dtron.training.update_scalars import UpdateScalars
from dtron.tree import flat, tree_map
from tests.helpers.examples import examples
from tests.helpers.runs import MODEL
from tests.helpers.texts import one_line
from tests.helpers.values import ONE, normal

SPEC = declare_model(MODEL)
SMALL_CHUNKS = mock.patch.object(offloaded_state, "CHUNK", 2000)
OPTIMS = [
    OptimConfig(),
    OptimConfig("muon", groups="vocab: lr=0.5x"),
    OptimConfig("lion", moments="bfloat16"),
    OptimConfig(moments="bfloat16", master_weights="split", ema=0.9),
]


def steps(optim: OptimConfig, compile: bool = False):
    """Three updates. The second is skipped."""
    params = init(SPEC, MODEL.dims(), 0, ONE)
    optimizer = build_optimizer(optim)
    optimizer = optimizer.compiled("aot_eager") if compile else optimizer
    state = init_state(optimizer, SPEC, params)
    params = stored_params(params, SPEC, state)
    state = with_compute_copies(state, params, SPEC, torch.bfloat16)
    for step in range(3):
        grads = tree_map(lambda w, step=step: normal(*w.shape, seed=step).float().detach(), params)
        scalars = UpdateScalars(1e-2, 0.7, torch.tensor(step != 1))
        params, state = apply_update(optimizer, SPEC, params, grads, state, scalars, ONE)
    return params, state


def same(optim: OptimConfig, compile: bool = False) -> None:
    want = steps(optim, compile)
    with SMALL_CHUNKS:
        assert len(offloaded_state._chunks(flat(SPEC))) > 3
        got = steps(replace(optim, offload_state=True), compile)
    assert got[1].trees.keys() == want[1].trees.keys()
    tensors = [
        flat((params, *state.trees.values(), state.compute_copies)) for params, state in (want, got)
    ]
    assert all(torch.equal(x, y) for x, y in zip(*tensors, strict=True))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("optim", OPTIMS)
def test_the_update_is_that_of_state_on_the_device(optim, compile):
    same(optim, compile)


def test_a_state_that_does_not_return_is_caught(monkeypatch):
    true = offloaded_state._copy
    seen = []

    def lost(pairs):
        seen.append(pairs)
        if len(seen) != 4:
            true(pairs)

    monkeypatch.setattr(offloaded_state, "_copy", lost)
    assert_caught(lambda: same(OptimConfig()))


@settings(max_examples=examples(2, thorough=50))
@example(OPTIMS[0], "pp=2,dp=2", 3, 0)
@given(
    optim=st.sampled_from(OPTIMS[:3]),
    mesh=st.sampled_from(["dp=2,tp=2", "dp=3", "pp=2,dp=2", "dp_replicate=2,dp=2"]),
    zero=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_on_a_mesh(optim, mesh, zero, seed):
    optim = replace(optim, offload_state=True)
    c = RunConfig(model=MODEL, data=DataConfig(seq_len=16), batch=12, seed=seed, optim=optim)
    with SMALL_CHUNKS:
        want = verify.one_step(verify.on_one_device(c), MeshShape())
        got = verify.one_step(replace(c, mesh=mesh, zero=zero), MeshShape.parse(mesh))
    loss, rows = verify.compare(want, got)
    assert loss <= verify.TOLERANCE and all(row.same for row in rows)


def test_a_checkpoint_moves_between_host_and_device(tmp_path):
    params, opt = steps(OptimConfig(offload_state=True))
    path = checkpoint.save(tmp_path, checkpoint.TrainState(3, 3, params, opt), SPEC, {})
    fresh = init(SPEC, MODEL.dims(), 1, ONE)
    state = checkpoint.TrainState(
        0, 0, fresh, init_state(build_optimizer(OptimConfig()), SPEC, fresh)
    )
    state = checkpoint.load(path, state, SPEC, {})
    for x, y in zip(flat(tuple(opt.trees.values())), flat(tuple(state.opt.trees.values()))):
        assert torch.equal(x, y)


def test_show_has_the_bytes_of_the_host(capsys):
    rows = show.rows(MODEL, MeshShape(), 1, optim=OptimConfig(offload_state=True))
    assert sum(r.optimizer for r in rows) == 0
    show.main(["--mesh=dp=2", "--optim.offload-state"])
    text = capsys.readouterr().out
    show.main(["--mesh=dp=2"])
    assert "of state on the host" in text and "on the host" not in capsys.readouterr().out


def test_too_little_host_memory_is_one_line(monkeypatch):
    monkeypatch.setattr(check_memory, "_host_memory", lambda: 30_000_000)
    plan_run(
        parse(["--device=cpu", "--optim.offload-state", "--model.layers=1", "--model.embed=64"])
    )
    flags = ["--device=cpu", "--optim.offload-state"]
    one_line(lambda: plan_run(parse(flags)), "--optim.offload-state", "GiB", "--optim.moments")
