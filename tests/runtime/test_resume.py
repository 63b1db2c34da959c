"""Resumed runs: the same losses on another mesh or pipeline, and refused checkpoints."""

import json
import shutil
import signal

import pytest
import torch

import train
from dtron import checkpoint
from dtron.data.sources import Chunks
from dtron.runtime.cli import load
from dtron.runtime.exit import run_cli
from dtron.training.lr_schedule import Progress
from tests.helpers.train_cli import MANY, TINY, agree, losses, refused, run

pytestmark = [pytest.mark.xdist_group("program"), pytest.mark.usefixtures("run_dir")]


@pytest.mark.parametrize(
    ("first", "then"),
    [([], MANY), (MANY, ["--zero=0", "--no-simulate", "--mesh=dp=1"])],
    ids=["split", "joined"],
)
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(
    run_dir, one_device, first, then, monkeypatch
):
    agree(run(run_dir, "--save-every=2", *first), one_device)
    shutil.rmtree(
        checkpoint.folder(run_dir) / "step-00000004"
    )  # as if the run had been killed before step 4
    starts, rows = [], Chunks.rows
    monkeypatch.setattr(
        Chunks, "rows", lambda self, start, n: starts.append(start) or rows(self, start, n)
    )
    found = run(run_dir, "--resume", *then)
    agree(found, one_device)
    assert starts[:2] == [8, 12]  # samples: two steps of four are done
    assert [record["tokens"] for record in found] == [64, 128, 192, 256]
    assert load(run_dir / "config.json").resume == "on"
    starts = [json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 2]
    meshes = [
        [a[7:] for a in argv if a.startswith("--mesh=")] or ["dp=1"] for argv in (first, then)
    ]
    assert [[start["mesh"]] for start in starts] == meshes
    assert all(start["torch"] == torch.__version__ and start["device"] == "cpu" for start in starts)


def stop_after(step: int, patch: pytest.MonkeyPatch) -> None:
    """The next run of this process gets a signal in this step. It finishes the step, saves, and
    exits."""
    rate = train.scheduled_rates

    def signalled(optim, at: Progress) -> float:
        if at.done + 1 == step:
            signal.raise_signal(signal.SIGUSR1)
        return rate(optim, at)

    patch.setattr(train, "scheduled_rates", signalled)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("pp=2 1f1b", "pp=4 zb-h1"),
        ("pp=2,tp=2 interleaved", "pp=2 zb-v"),
        ("pp=4 gpipe", "dp=2,tp=2 1f1b"),
    ],
)
def test_a_run_resumes_on_another_pipeline(run_dir, first, then, monkeypatch):
    """Another pp, another schedule, other stages per rank, and both copies of the tied
    embedding."""

    def flags(text: str) -> list[str]:
        mesh, schedule = text.split()
        model = ["--model.layers=4", "--model.tied", "--micro-batch=1"]
        return [
            "--simulate",
            f"--mesh={mesh}",
            f"--pipeline.schedule={schedule}",
            "--sample-tokens=0",
            *model,
        ]

    plain = ["--model.layers=4", "--model.tied"]
    want = losses(run(run_dir.with_name("one"), *plain))
    stop_after(
        2, monkeypatch
    )  # two steps of each: what is left of the first is slow, and the next begins
    found = run(run_dir, *flags(first))
    assert losses(found) == pytest.approx(want[:2], rel=1e-5)
    agree(run(run_dir, "--resume", *flags(then)), want)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 16), (8, 128)])
def test_a_run_goes_on_with_another_batch_size(run_dir, batch, tokens):
    """The steps that are left are counted, not the samples."""
    run(run_dir, "--save-every=2", "--steps=2", "--eval-every=0", "--sample-tokens=0")
    found = run(run_dir, "--resume", f"--batch={batch}", "--steps=5")
    assert [record["tokens"] for record in found] == [
        64,
        128,
        *(128 + tokens * i for i in (1, 2, 3)),
    ]


def test_a_checkpoint_that_does_not_fit_is_refused(run_dir, capsys):
    run(run_dir, "--save-every=2")
    resume = [f"--run-dir={run_dir}", "--resume"]
    assert "--model.mlp 64" in refused(capsys, *resume, "--model.mlp=96")
    assert "--seed 0" in refused(capsys, *resume, "--seed=1")
    data = max(checkpoint.newest(run_dir).iterdir(), key=lambda file: file.stat().st_size)
    data.write_bytes(data.read_bytes()[:-100])
    message = refused(capsys, *resume)
    assert "not whole" in message and str(data) in message
    shutil.rmtree(data.parent)  # the remedy that the message names
    assert [record["step"] for record in run(run_dir, "--resume")] == [1, 2, 3, 4]


def test_a_refused_resume_leaves_the_run_as_it_was(run_dir, capsys):
    run(run_dir, "--save-every=2")
    before = {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()}
    refused(capsys, f"--run-dir={run_dir}", "--resume", "--model.mlp=96")
    refused(capsys, f"--run-dir={run_dir}", "--resume", "--data.path=gone.jsonl")
    assert {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()} == before


def test_a_new_run_in_a_used_folder_does_not_resume_the_old_one(run_dir):
    """Either the new run is refused, or the newest checkpoint is its own."""
    run(run_dir, "--save-every=2")
    code = run_cli(train.main, [*TINY, f"--run-dir={run_dir}", "--save-every=2", "--steps=2"])
    assert code == 2 or checkpoint.newest(run_dir).name == "step-00000002"
