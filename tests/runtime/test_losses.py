"""Runs with other losses than the cross entropy: equal on several meshes, resumed, and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import train
from dtron.runtime.exit import run_cli
from tests.helpers.hf_models import folder
from tests.helpers.texts import words
from tests.helpers.train_cli import enter, records

pytestmark = pytest.mark.xdist_group("program")

RUN = ["--data.seq-len=32", "--batch=4", "--device=cpu", "--sample-tokens=0", "--optim.lr=1e-2"]
RUN += ["--data.tokenizer=model/tokenizer.json", "--data.end-token=</s>", "--init-from=model"]
RUN += ["--data.validation-ratio=0.1", "--optim.warmup=1", "--save-every=2"]
DPO = ["--data.path=pairs.jsonl", "--data.kind=preference", "--loss.name=dpo", "--loss.beta=0.5"]
STUDENT = ["--data.path=text.txt", "--loss.name=distillation", "--loss.teacher=teacher"]


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A model with a tokenizer, a wider teacher, pairs of answers, and a text."""
    enter(tmp_path, monkeypatch)
    shutil.copytree(folder("qwen2"), "model")
    shutil.copytree(folder("llama"), "teacher")
    vocab = {f"w{i}": i for i in range(60)} | {"</s>": 60}
    words(vocab, tmp_path / "model" / "tokenizer.json")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i * i % 60}" for i in range(3000)))
    with open("pairs.jsonl", "w") as file:
        for i in range(80):
            row = {
                "prompt": f"w{i % 7} w1",
                "chosen": " w2 w3" * (1 + i % 2),
                "rejected": f" w{5 + i % 9}",
            }
            file.write(json.dumps(row) + "\n")


def run(name: str, *flags: str) -> list[dict]:
    assert run_cli(train.main, [*RUN, f"--run-dir={name}", *flags]) == 0
    return records(Path(name))


def numbers(found: list[dict]) -> list[list[float]]:
    names = [n for n in found[0] if n.startswith(("loss", "reward", "diverg", "cross", "grad"))]
    return [[record[name] for name in names] for record in found]


@pytest.mark.parametrize("lora", [(), ("--lora.rank=2",)])
def test_dpo_learns_pairs_and_is_the_same_on_a_mesh_and_resumed(models, lora):
    """The first loss is log 2: the model is its own reference. A resumed run has the reference of
    the run, and not the weights of the checkpoint."""
    found = run("one", *DPO, *lora, "--steps=4")
    assert found[0]["loss"] == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-5)
    assert found[0]["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert found[-1]["loss"] < 0.68 and found[-1]["reward_margin"] > 0.02
    assert 0 <= found[-1]["reward_accuracy"] <= 1 and found[-1]["validation_loss"] < 0.69
    margin = found[-1]["reward_chosen"] - found[-1]["reward_rejected"]
    assert found[-1]["reward_margin"] == pytest.approx(margin, abs=1e-5)
    mesh = ["--simulate", "--mesh=dp=2,cp=2", "--zero=3"]
    several = run("several", *DPO, *lora, "--steps=4", *mesh)
    for got, want in zip(numbers(several), numbers(found), strict=True):
        assert got == pytest.approx(want, rel=2e-3, abs=1e-5)
    shutil.rmtree("one/checkpoints/step-00000004")
    assert run_cli(train.main, ["--run-dir=one", "--resume"]) == 0
    for got, want in zip(numbers(records(Path("one")))[-2:], numbers(found)[-2:], strict=True):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-6)


def test_a_student_learns_from_a_teacher_of_another_family(models):
    found = run("one", *STUDENT, "--steps=3", "--loss.temperature=2")
    first = found[0]
    assert first["loss"] == pytest.approx(
        0.5 * first["cross_entropy"] + 0.5 * 4 * first["divergence"], rel=1e-5
    )
    several = run(
        "several",
        *STUDENT,
        "--steps=3",
        "--loss.temperature=2",
        "--simulate",
        "--mesh=pp=2,tp=2",
        "--zero=1",
    )
    for got, want in zip(numbers(several), numbers(found), strict=True):
        assert got == pytest.approx(want, rel=2e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--loss.name=dpo"], ["--data.kind preference"]),
        ([*DPO[:2]], ["--loss.name dpo"]),
        (["--loss.name=dop"], ["--loss.name dop", "cross_entropy or dpo"]),
        (["--loss.beta=0.2"], ["--loss.beta 0.2", "cross_entropy"]),
        ([*DPO, "--loss.teacher=teacher"], ["--loss.teacher teacher", "leave"]),
        ([*DPO, "--loss.beta=-1"], ["loss.beta=-1", "from 0"]),
        ([*DPO, "--model.z-loss=0.1"], ["--model.z-loss 0.1"]),
        ([*DPO, "--lora.rank=2", "--lora.trained=*norm*"], ["--lora.trained", "--loss.reference"]),
        (["--loss.name=distillation"], ["--loss.teacher"]),
        ([*STUDENT, "--loss.weight=2"], ["loss.weight=2", "from 0 to 1"]),
        ([*STUDENT, "--loss.reverse", "--loss.top-k=4"], ["--loss.top-k 4", "--loss.reverse"]),
        ([*STUDENT[:2], "--loss.teacher=gone"], ["gone"]),
        ([*STUDENT, "--loss.top-k=1000"], ["--loss.top-k 1000", "words"]),
        ([*DPO, "--cuda-graph=on"], ["--cuda-graph on"]),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(models, capsys, flags, parts):
    assert run_cli(train.main, [*RUN, *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in parts:
        assert part in error


def test_a_teacher_of_other_words_is_refused(models, capsys):
    config = json.loads(Path("teacher/config.json").read_text())
    with open("teacher/config.json", "w") as file:
        json.dump(config | {"vocab_size": config["vocab_size"] + 3}, file)
    assert run_cli(train.main, [*RUN, *STUDENT]) == 2
    error = capsys.readouterr().err
    assert "--loss.teacher teacher: has" in error and "one tokenizer" in error
