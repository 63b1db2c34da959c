"""A run from a Hugging Face folder: the same on every mesh, resumable, and exported again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import train
from dtron.hf.__main__ import main as hf_main
from dtron.hf.weight_files import Reader
from dtron.tools.generate import main as generate
from tests.helpers.hf_models import folder
from tests.helpers.texts import words
from tests.helpers.train_cli import enter

pytestmark = pytest.mark.xdist_group("program")

SMALL = [
    "--data.path=text.txt",
    "--data.seq-len=16",
    "--batch=4",
    "--sample-tokens=3",
    "--device=cpu",
]
SMALL += ["--save-every=1"]


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """A model with a tokenizer, and a text."""
    enter(tmp_path, monkeypatch)
    shutil.copytree(folder("qwen2"), "model")
    vocab = {f"w{i}": i for i in range(60)} | {"</s>": 60}
    words(vocab, tmp_path / "model" / "tokenizer.json")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i * i % 60}" for i in range(3000)))


def losses(run_dir: str, *flags: str) -> list[float]:
    assert train.main(["--init-from=model", f"--run-dir={run_dir}", *SMALL, *flags]) == 0
    with open(f"{run_dir}/metrics.jsonl") as file:
        return [json.loads(line)["loss"] for line in file]


def test_from_a_folder_to_a_folder(beside, capsys):
    """A learning rate of 0 leaves the weights unchanged. Then two steps: on one device, and with a
    resume on another mesh."""
    start = losses("still", "--steps=1", "--optim.lr=0", "--simulate", "--mesh=tp=2")
    assert hf_main(["export", "still", "out"]) == 0
    before, after = Reader(Path("model")), Reader(Path("out"))
    assert before.entries.keys() == after.entries.keys()
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.entries)
    want = losses("one", "--steps=2")
    assert want[0] == pytest.approx(start[0], rel=1e-5) and want[1] != want[0]
    losses("several", "--steps=2", "--simulate", "--mesh=dp=2", "--zero=3")
    shutil.rmtree("several/checkpoints/step-00000002")
    got = losses("several", "--steps=2", "--resume")
    assert got[-1] == pytest.approx(want[1], rel=1e-4)
    capsys.readouterr()
    argv = ["--prompt", "w1 w4 w9", "--tokens", "5", "--temperature", "0"]
    assert generate(["--from", "model", *argv]) == 0 and generate(["--from", "out", *argv]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and first.startswith("w1 w4 w9 ")
