"""The average of the weights: its definition, on meshes, in runs, and exported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train as program
from dtron import checkpoint
from dtron.distributed.mesh_shape import MeshShape
from dtron.hf.__main__ import main as hf
from dtron.model.transformer import declare_model
from dtron.params import init
from dtron.runtime.config import DataConfig, OptimConfig, RunConfig
from dtron.runtime.exit import run_cli
from dtron.testing import assert_caught
from dtron.tools import generate, verify
from dtron.training import weight_average
from dtron.training.optim_config import build_optimizer
from dtron.training.optimizer import apply_update, init_state
from dtron.training.parameter_groups import describe_groups
from dtron.training.update_scalars import UpdateScalars
from dtron.tree import flat, tree_map
from tests.helpers.runs import MODEL
from tests.helpers.texts import one_line
from tests.helpers.values import F64, ONE, normal
from tests.training.test_optimizer_seam_runs import FLAGS


def follows_its_definition(compile: bool) -> None:
    spec = declare_model(MODEL)
    params = init(spec, MODEL.dims(), 0, ONE, F64)
    optimizer = build_optimizer(OptimConfig(ema=0.3, groups="vocab: lr=0.5x"))
    optimizer = optimizer.compiled("aot_eager") if compile else optimizer
    state = init_state(optimizer, spec, params)
    want = [w.clone() for w in flat(params)]
    for n in range(1, 7):
        grads = tree_map(lambda w, n=n: normal(*w.shape, seed=n).detach(), params)
        ok = torch.tensor(n != 3)  # a step that is not finite moves nothing
        scalars = UpdateScalars(0.1, 0.7, ok)
        params, state = apply_update(optimizer, spec, params, grads, state, scalars, ONE)
        d = min(0.3, (1 + n) / (10 + n))
        if n != 3:
            want = [d * x + (1 - d) * w for x, w in zip(want, flat(params), strict=True)]
    for x, y in zip(want, flat(state.trees["ema"]), strict=True):
        torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("compile", [False, True])
def test_it_follows_its_definition(compile, monkeypatch):
    follows_its_definition(compile)
    twice = lambda average, w, share: average.add_(2 * share * (w.data - average))
    monkeypatch.setattr(weight_average.WeightAverage, "__init__", _with(twice))
    assert_caught(lambda: follows_its_definition(False))


def _with(kernel):
    made = weight_average.WeightAverage.__init__
    return lambda self, base, decay, kernel=kernel: made(self, base, decay, kernel=kernel)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_on_a_mesh(name):
    optim = OptimConfig(name=name, ema=0.9)
    c = RunConfig(model=MODEL, data=DataConfig(seq_len=16), batch=12, seed=3, optim=optim)
    want = verify.one_step(verify.on_one_device(c), MeshShape())
    got = verify.one_step(replace(c, mesh="dp=2,tp=2", zero=3), MeshShape.parse("dp=2,tp=2"))
    loss, rows = verify.compare(want, got)
    assert "ema" in want.state and loss <= verify.TOLERANCE and all(row.same for row in rows)


def test_groups_are_found_behind_it():
    optimizer = build_optimizer(OptimConfig(ema=0.9, groups="vocab: lr=0.5x"))
    assert len(describe_groups(optimizer, declare_model(MODEL))) == 2


def run(folder: Path, *flags: str) -> list[dict]:
    text = folder / "text.txt"
    text.write_text("".join(f"def f{i}(x): return x + {i}\n" for i in range(400)))
    argv = [*FLAGS, f"--data.path={text}", f"--run-dir={folder / 'run'}", *flags]
    assert run_cli(program.main, argv) == 0
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_validates_saves_and_exports_it(tmp_path, capsys):
    records = run(tmp_path, "--optim.ema=0.9", "--eval-every=2", "--mesh=dp=2", "--zero=3")
    assert {"validation_loss", "ema_validation_loss"} <= records[-1].keys()
    assert records[-1]["ema_validation_loss"] != records[-1]["validation_loss"]
    assert "of the average of the weights" in capsys.readouterr().out
    for flags, out in ([], "weights"), (["--ema"], "average"):
        assert hf(["export", str(tmp_path / "run"), str(tmp_path / out), *flags]) == 0
    path = checkpoint.newest(tmp_path / "run")
    with checkpoint.ShardReader(path, checkpoint.read_meta(path)) as reader:
        w = declare_model(_model(tmp_path)).embedding.w_tokens
        for average, out in (False, "weights"), (True, "average"):
            want = checkpoint.read_weight(reader, w, average=average)
            got = load_file(tmp_path / out / "model.safetensors")["model.embed_tokens.weight"]
            torch.testing.assert_close(got.float(), want[: len(got)], rtol=1e-2, atol=1e-3)
            assert want.abs().sum() > 0
    argv = ["--from", str(tmp_path / "run"), "--prompt", "def", "--tokens", "3", "--ema"]
    assert run_cli(generate.main, argv) == 0


def _model(folder: Path):
    from dtron.runtime.run_directory import read_run

    return read_run(folder / "run")[0].model


def test_an_average_may_begin_later_and_end(tmp_path):
    run(tmp_path, "--steps=2")
    path = checkpoint.newest(tmp_path / "run")
    argv = ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--ema"]
    one_line(lambda: hf(argv), "has no average of the weights", "leave --ema out")
    assert not checkpoint.state.has_average(checkpoint.read_meta(path))
    run(tmp_path, "--steps=4", "--resume", "--optim.ema=0.9")
    assert checkpoint.state.has_average(checkpoint.read_meta(checkpoint.newest(tmp_path / "run")))
    run(tmp_path, "--steps=6", "--resume", "--optim.ema=0")
    path = checkpoint.newest(tmp_path / "run")
    assert not checkpoint.state.has_average(checkpoint.read_meta(path))


def test_an_average_that_begins_later_begins_as_the_weights(tmp_path):
    spec = declare_model(MODEL)
    params = init(spec, MODEL.dims(), 0, ONE)
    plain, averaged = (build_optimizer(OptimConfig(ema=d)) for d in (0.0, 0.9))
    saved = checkpoint.TrainState(1, 8, params, init_state(plain, spec, params))
    path = checkpoint.save(tmp_path, saved, spec, {})
    fresh = init(spec, MODEL.dims(), 1, ONE)
    state = checkpoint.TrainState(0, 0, fresh, init_state(averaged, spec, fresh))
    loaded = checkpoint.load(path, state, spec, {})
    pairs = zip(flat(loaded.opt.trees["ema"]), flat(params), strict=True)
    assert all(torch.equal(a, w) for a, w in pairs)


def test_a_decay_of_one_is_refused():
    one_line(lambda: OptimConfig(ema=1.0), "optim.ema=1.0", "under 1")
