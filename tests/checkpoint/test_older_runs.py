"""A run that an older version wrote goes on. Its directory is in tests/fixtures, under the commit
that wrote it."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import pytest

import train
from dtron.checkpoint.__main__ import main as convert
from dtron.runtime.config import RunConfig
from dtron.runtime.exit import run_cli
from tests.helpers.paths import FIXTURES

MODEL = [
    "--model.layers=1",
    "--model.embed=16",
    "--model.heads=2",
    "--model.kv-heads=1",
    "--model.head-dim=8",
    "--model.mlp=16",
    "--model.vocab=280",
    "--model.vocab-multiple=1",
]
RUN = [
    "--data.seq-len=16",
    "--batch=4",
    "--steps=4",
    "--sample-tokens=0",
    "--optim.warmup=1",
    "--eval-every=0",
]


@pytest.mark.parametrize("mesh", ["", "dp=2"])
def test_a_run_of_before_the_folders_resumes(tmp_path, mesh, capsys):
    """Resumed at step 2, the run has the losses that the older version had at steps 3 and 4."""
    run_dir = tmp_path / "run"
    shutil.copytree(FIXTURES / "run-fdfba95", run_dir)
    shutil.copy(FIXTURES / "text.txt", tmp_path)
    want = [
        json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    flags = [
        *MODEL,
        *RUN,
        "--device=cpu",
        f"--data.path={tmp_path / 'text.txt'}",
        f"--run-dir={run_dir}",
    ]
    assert run_cli(train.main, [*flags, "--resume"]) == 2
    assert "python -m dtron.checkpoint convert" in capsys.readouterr().err
    assert run_cli(convert, ["convert", str(run_dir)]) == 2
    assert "can run any code" in capsys.readouterr().err
    assert run_cli(convert, ["convert", str(run_dir), "--trust"]) == 0
    mesh_flags = ["--simulate", f"--mesh={mesh}"] if mesh else []
    assert run_cli(train.main, [*flags, *mesh_flags, "--resume"]) == 0
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    got = [record["loss"] for record in records]
    assert got == pytest.approx(want, rel=1e-5) and len(got) == 4
    # Its records and its config have today's names too.
    of_some = {"validation_loss", "checkpoint_stall_seconds", "samples"}
    names = [set(r) - of_some for r in records]
    assert names == [names[-1]] * 4
    assert json.loads((run_dir / "config.json").read_text()).keys() == asdict(RunConfig()).keys()
