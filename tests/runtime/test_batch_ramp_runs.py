"""Runs of train.py with a batch ramp: their samples, resumes in the middle, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from dtron.checkpoint import files
from dtron.data.sources import Chunks
from dtron.runtime.cli import load, parse
from dtron.runtime.launch import plan_run
from tests.helpers.checkpoints import weights
from tests.helpers.train_cli import losses, records, refused, run

pytestmark = [pytest.mark.xdist_group("program"), pytest.mark.usefixtures("run_dir")]

STEPS = [
    "--steps=6",
    "--sample-tokens=0",
    "--save-every=1",
    "--eval-every=3",
    "--log-every=1",
    "--model.layers=2",
]
RAMP = [*STEPS, "--batch=2:0, 4:2, 8:4", "--micro-batch=2"]
PIPELINE = ["--mesh=pp=2", "--model.layers=2"]
SIZES = [2, 2, 4, 4, 8, 8]
TOKENS = [*STEPS, "--batch=2:0, 4:0.06K, 8:0.19K"]  # after 64 and 192 tokens, of 16 in a sample
DECAY = ["--optim.weight-decay-schedule=linear", "--optim.final-weight-decay=3"]


def test_a_ramped_run_says_where_it_is(run_dir, monkeypatch, capsys):
    starts, rows = [], Chunks.rows
    read = lambda self, start, n: starts.append((start, n)) or rows(self, start, n)
    monkeypatch.setattr(Chunks, "rows", read)
    found = run(run_dir, *RAMP)
    out = capsys.readouterr().out
    used = [0, 2, 4, 8, 12, 20, 28]
    assert [x for x in starts if x[0] or x[1] == 2][:6] == [*zip(used[:-1], SIZES, strict=True)]
    assert [record["samples"] for record in found] == used[1:]
    assert [record["tokens"] for record in found] == [16 * n for n in used[1:]]
    assert "2 to 8 x 16 tokens a step in 1 to 4 microbatches" in out
    assert re.findall(r"(\d+) samples  (\d+) tokens", out) == [
        (str(n), str(16 * n)) for n in used[1:]
    ]
    assert load(run_dir / "config.json").batch == "2:0, 4:2, 8:4"
    assert losses(found)[-1] < losses(found)[0]
    same = run(run_dir.with_name("tokens"), *TOKENS, "--micro-batch=2")
    assert [record["loss"] for record in same] == losses(found)  # the same points, in tokens


def resumed_after(run_dir: Path, done: int, *argv: str) -> Path:
    """Copy a run as if it had been killed after this step, and go on in the copy."""
    copy = run_dir.with_name(f"{run_dir.name}-{done}")
    shutil.copytree(run_dir, copy)
    for step in range(done + 1, 7):
        shutil.rmtree(files.target(copy, step))
    run(copy, *argv, "--resume")
    return copy


@pytest.mark.parametrize("flags", [RAMP, [*TOKENS, *DECAY, "--data.packing=best-fit"]])
def test_a_resumed_run_is_the_run_to_the_bit(run_dir, flags):
    """The checkpoint is at the end of a size of the ramp, or inside of it."""
    want = run(run_dir, *flags)
    for done in (2, 3):
        copy = resumed_after(run_dir, done, *flags)
        assert losses(records(copy)) == losses(want)
        assert [r["samples"] for r in records(copy)] == [r["samples"] for r in want]
        assert [r["lr"] for r in records(copy)] == [r["lr"] for r in want]
        assert weights(copy) == weights(run_dir)


def test_a_resumed_run_has_the_same_losses_on_another_mesh(run_dir):
    want = run(run_dir, *RAMP, *DECAY)
    decays = [0.1 + 2.9 * used / 20 for used in (0, 2, 4, 8, 12, 20)]
    assert [r["weight_decay"] for r in want] == pytest.approx(decays)
    for done, mesh in ((1, ["--mesh=dp=2", "--zero=3", "--micro-batch=1"]), (3, PIPELINE)):
        found = records(resumed_after(run_dir, done, *RAMP, *DECAY, "--simulate", *mesh))
        assert losses(found) == pytest.approx(losses(want), rel=1e-5)
        at = [r.get("validation_loss") for r in want]
        assert [r.get("validation_loss") for r in found] == [
            x and pytest.approx(x, rel=1e-4) for x in at
        ]


def test_a_plain_run_goes_on_with_a_ramp(run_dir, capsys):
    """Also the checkpoint of a version without ramps: its config has a number. The ramp counts the
    samples that the run has used: 6 of them."""
    run(run_dir, *STEPS, "--batch=2")
    assert json.loads((run_dir / "config.json").read_text())["batch"] == 2
    capsys.readouterr()
    copy = resumed_after(run_dir, 3, *STEPS, "--batch=2:0, 4:0.15K")  # from 9.375 samples on
    assert [r["samples"] for r in records(copy)] == [2, 4, 6, 8, 10, 14]
    out = capsys.readouterr().out
    assert "--batch: 2 -> 2:0, 4:0.15K" in out and "learning-rate schedule has changed" in out


def test_each_wrong_ramp_is_one_line(capsys):
    for flags, parts in (
        (
            ["--batch", "2:0, 5:2", "--micro-batch", "2"],
            ["batch=5", "micro_batch=2", "use a size of 4"],
        ),
        (
            ["--batch", "4:0, 6:9", "--mesh", "dp=4", "--simulate"],
            ["batch=6", "4 data ranks", "use a size of 4"],
        ),
        (["--batch", "2:0,4:1T"], ["'1T' is no point"]),
        (["--batch", "x"], ["--batch 'x'", "a ramp"]),
        (["--batch", "0.5"], ["--batch '0.5'"]),
        (["--batch", "0"], ["--batch 0", "at least 1"]),
        (["--batch", "8:0, 400000:10", "--micro-batch", "1"], ["400000 microbatches"]),
        (["--batch", "400000:0, 400001:9", "--micro-batch=None"], ["400000 microbatches"]),
        (
            [*PIPELINE, "--simulate", "--pipeline.schedule", "dualpipe-v", "--batch", "1:0, 8:2"],
            ["needs at least 4 microbatches"],
        ),
    ):
        message = refused(capsys, "--micro-batch=1", *flags)
        assert message.count("\n") <= 1 and all(part in message for part in parts), message


def test_a_plan_has_the_microbatches_of_each_size():
    plan = plan_run(parse(["--batch", "8:0, 12:4, 20:7", "--simulate", "--mesh", "dp=2"]))
    assert (plan.counts, plan.rows, plan.count) == ((2, 3, 5), 4, 2)
