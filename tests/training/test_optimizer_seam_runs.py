"""The optimizers of toy_optimizers.py in runs: saved, resumed, measured, and known to commands."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train as program
from dtron import checkpoint
from dtron.checkpoint.__main__ import main as inspect_checkpoint
from dtron.checkpoint.meta import encode_meta
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import simulated
from dtron.mesh import Layout
from dtron.model.transformer import declare_model
from dtron.params import init
from dtron.rules import rules_for
from dtron.runtime.cli import parse
from dtron.runtime.config import OptimConfig, RunConfig
from dtron.runtime.exit import run_cli
from dtron.testing import assert_caught
from dtron.tools import show, verify
from dtron.tools.compare_steps import StepResult
from dtron.training.optim_config import build_optimizer
from dtron.training.optimizer import (
    init_state,
)
from dtron.tree import flat
from tests.checkpoint.test_checkpoint import built as built_state
from tests.checkpoint.test_checkpoint import differences, move_on_pool
from tests.helpers.paths import ROOT
from tests.helpers.runs import MODEL
from tests.helpers.texts import one_line
from tests.helpers.values import ONE
from tests.test_house import graph
from tests.tools.test_show import _first_rank
from tests.training.toy_optimizers import BOTH, SGD

pytestmark = pytest.mark.usefixtures("toy_optimizers")


# ---- saved and resumed


NAMES = SGD.state_names
MOVES = [
    (("dp=2,tp=2", 3, "1f1b"), ("pp=2,tp=2", 1, "zb-v")),
    (("pp=2,dp=2", 1, "1f1b"), ("dp=2,tp=2,ep=4", 3, "1f1b")),
]


@pytest.mark.parametrize(("saved", "loaded"), MOVES)
def test_state_moves_to_another_mesh_to_the_bit(tmp_path, saved, loaded):
    with simulated(MeshShape.parse(saved[0])) as mesh:
        spec, state = built_state(saved, None, mesh, False, NAMES)
        checkpoint.save(tmp_path, state, spec, {})
    with simulated(MeshShape.parse(loaded[0])) as mesh:
        assert differences(loaded, None, mesh, str(tmp_path), NAMES) == []


@pytest.mark.xdist_group("pool")
def test_state_moves_between_real_ranks(pool, tmp_path):
    assert pool.run(move_on_pool, *MOVES[0], str(tmp_path), "", NAMES) == [[]] * 4


FLAGS = [
    "--model.layers=1",
    "--model.embed=16",
    "--model.heads=2",
    "--model.kv-heads=2",
    "--model.head-dim=8",
    "--model.mlp=16",
    "--model.vocab=280",
    "--data.seq-len=16",
    "--batch=4",
    "--steps=4",
    "--sample-tokens=0",
    "--eval-every=0",
    "--dtype=float64",
    "--device=cpu",
    "--simulate",
    "--optim.schedule=constant",
    "--optim.warmup=0",
    "--optim.lr=0.05",
    "--save-every=2",
]


def losses(run_dir: Path, *flags: str) -> list[float]:
    """The losses of a run of train.py, from its log."""
    text = run_dir.parent / "text.txt"
    text.write_text("".join(f"def f{i}(x): return x + {i}\n" for i in range(400)))
    assert (
        run_cli(program.main, [*FLAGS, f"--data.path={text}", f"--run-dir={run_dir}", *flags]) == 0
    )
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def resumed(folder: Path, name: str) -> None:
    """Step 4 is the first whose loss depends on the state in the checkpoint of step 2."""
    flags = [f"--optim.name={name}", "--optim.options=momentum=0.8"]
    want = losses(folder / "run", "--mesh=dp=2,tp=2", "--zero=3", *flags)
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000004")
    got = losses(folder / "run", "--mesh=dp=2", "--zero=1", "--resume", *flags)
    assert got == pytest.approx(want, rel=1e-9) and len(got) == 4


@pytest.mark.parametrize("name", BOTH)
def test_a_run_resumes_on_another_mesh(tmp_path, name, monkeypatch):
    (tmp_path / "right").mkdir()
    (tmp_path / "wrong").mkdir()
    resumed(tmp_path / "right", name)
    true = checkpoint.state.tensors
    monkeypatch.setattr(checkpoint.state, "tensors", lambda *args: _forget(true(*args)))
    assert_caught(lambda: resumed(tmp_path / "wrong", name))


def _forget(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state is saved as zeros."""
    return {k: x if k.startswith("params.") else torch.zeros_like(x) for k, x in named.items()}


def test_another_optimizer_is_refused_in_one_line(tmp_path, capsys):
    flags = ["--mesh=dp=2", "--steps=2"]
    losses(tmp_path / "run", *flags)
    shared = [*FLAGS, f"--data.path={tmp_path / 'text.txt'}", f"--run-dir={tmp_path / 'run'}"]
    argv = [*shared, "--mesh=dp=2", "--steps=3", "--resume", "--optim.name=my-sgd"]
    capsys.readouterr()
    assert run_cli(program.main, argv) == 2
    error = capsys.readouterr().err
    assert "was made with optim.name=adamw, this run has my-sgd; use --optim.name adamw" in error
    path = checkpoint.newest(tmp_path / "run")
    meta = checkpoint.read_meta(path)
    del meta.identity["optim.name"]  # as an older version wrote it
    (path / "meta.json").write_bytes(encode_meta(meta))
    assert run_cli(program.main, argv) == 2
    assert capsys.readouterr().err == error


def test_inspect_lists_the_state(tmp_path, capsys):
    spec, state = built_state(("dp=1", 0, "1f1b"), None, None, False, NAMES)
    checkpoint.save(tmp_path, state, spec, {})
    assert inspect_checkpoint(["inspect", str(checkpoint.newest(tmp_path))]) == 0
    assert "parameters; optimizer state: momentum" in capsys.readouterr().out


# ---- its memory, its proof, its flags


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("zero", [0, 3])
def test_the_bytes_are_those_of_real_shards(name, zero):
    shape, optim = MeshShape.parse("dp=3,tp=2"), OptimConfig(name=name)
    with simulated(shape) as mesh:
        spec = declare_model(MODEL)
        params = init(spec, MODEL.dims(), 0, Layout(mesh, rules_for(zero)))
        trees = init_state(build_optimizer(optim), spec, params).trees.values()
        held = sum(4 * _first_rank(x).numel() for tree in trees for x in flat(tree))
    total = lambda optim: show.total(show.rows(MODEL, shape, zero, compute=4, optim=optim))
    assert total(optim)[2] == held > 0
    assert total(optim)[2] <= total(None)[2] / 2 and total(optim)[:2] == total(None)[:2]


def test_the_commands_take_its_name(capsys):
    model = ["--model.layers=1", "--model.embed=32", "--model.heads=2", "--model.kv-heads=2"]
    model += ["--model.head-dim=16", "--model.mlp=64", "--model.vocab=300", "--mesh=dp=2,tp=2"]
    sizes = []
    for name in ("adamw", "my-sgd"):
        assert show.main([*model, f"--optim.name={name}"]) == 0
        out = capsys.readouterr().out
        sizes.append(re.search(r"bf16: (.*) and activations", out)[1])  # the memory estimate
    assert sizes[0] != sizes[1]
    flags = [*model, "--optim.options=momentum=0.7"]
    assert run_cli(verify.main, [*flags, "--optim.name=my-sgd"]) == 0
    assert "the same result as one device" in capsys.readouterr().out


def test_verify_names_the_weight_whose_state_differs(capsys, monkeypatch):
    """The mesh has another optimizer than the device."""
    step = verify.one_step

    def one_step(c: RunConfig, shape: MeshShape, **how: Any) -> StepResult:
        mutant = replace(c.optim, name="shard-mean" if shape.size > 1 else "my-sgd")
        return step(replace(c, optim=mutant), shape, **how)

    monkeypatch.setattr(verify, "one_step", one_step)
    model = ["--model.layers=1", "--model.embed=32", "--model.heads=2", "--model.kv-heads=2"]
    assert run_cli(verify.main, [*model, "--model.head-dim=16", "--mesh=dp=2"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    found = re.search(r"differs from one device, first in embedding.w_tokens \((.*)\)", out)[1]
    grad, weight, state = (float(part.split()[1]) for part in found.split(", "))
    assert grad < 1e-9 < state and weight > 1e-9


@pytest.mark.parametrize(
    ("optim", "parts"),
    [
        ({"name": "adam"}, ["optim.name=adam", "use adamw or muon or lion or sgd"]),
        ({"options": "momentum=0.9"}, ["optim.options=momentum=0.9", "adamw", "has none"]),
        ({"name": "my-sgd", "options": "beta=1"}, ["no option 'beta'", "it has momentum"]),
        ({"name": "my-sgd", "options": "weight_decay=1"}, ["no option 'weight_decay'"]),
        ({"name": "my-sgd", "options": "momentum=x"}, ["momentum must be a float, not 'x'"]),
        ({"name": "my-sgd", "options": "momentum"}, ["momentum must be a float, not ''"]),
        ({"name": "my-sgd", "options": "momentum=1"}, ["optim.momentum=1.0", "under 1"]),
    ],
)
def test_what_does_not_exist_is_one_line(optim, parts):
    one_line(lambda: OptimConfig(**optim), *parts)
    flags = [f"--optim.{name}={value}" for name, value in optim.items()]
    one_line(lambda: parse(flags), *parts)


def test_options_are_flags_of_the_config_or_its_own():
    parsed = parse(
        ["--optim.name=my-sgd", "--optim.options=momentum=0.5", "--optim.weight-decay=0.2"]
    )
    assert build_optimizer(parsed.optim) == SGD(weight_decay=0.2, momentum=0.5)
    assert build_optimizer(OptimConfig(name="my-sgd")) == SGD(weight_decay=0.1, momentum=0.9)


def test_a_tree_that_a_checkpoint_cannot_name_is_refused():
    for name in ("params", "m.v"):

        class Wrong(SGD):
            state_names = (name,)

        with pytest.raises(ValueError, match=f"'{name}'; rename it"):
            init_state(
                Wrong(0.0), declare_model(MODEL), init(declare_model(MODEL), MODEL.dims(), 0, ONE)
            )


def test_one_file_knows_each_optimizer():
    """Only the table of names imports it, and Muon imports AdamW."""
    for name in ("adamw", "muon", "lion", "sgd"):
        importers = {file for file, others in graph().items() if f"training.{name}" in others}
        assert importers - {"training.muon"} == {"training.optim_config"}


def test_the_page_shows_this_optimizer():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    code = inspect.getsource(SGD)
    assert f"```python\n{code}```" in page
