"""``dtron plan`` as a user runs it."""

from __future__ import annotations

import json

import pytest

from dtron.planner.gpu_rates import FOLDER, known_gpus, load_gpu
from dtron.runtime.exit import run_cli
from dtron.tools import plan
from tests.helpers.texts import one_line

SMALL = ["--model=tiny", "--model.layers=2", "--batch=8", "--micro-batch=2", "--data.seq-len=64"]


def test_the_tables_and_the_verdict(capsys):
    argv = ["--mesh", "dp=2,tp=2", "--zero", "3", "--token-budget", "1B", *SMALL]
    assert plan.main(argv) == 0
    said = capsys.readouterr().out
    for part in ("activations", "waits for tp", "nvlink", "fits:", "MFU", "GPU-hours"):
        assert part in said


def test_json_is_one_line(capsys):
    assert plan.main(["--mesh", "pp=2", "--json", *SMALL]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert [r["rank"] for r in found["ranks"]] == [0, 1]
    assert found["fits"] and found["step_ms"] > 0
    joules = found["joules_per_token"] * found["tokens_per_s_per_gpu"]
    assert joules == pytest.approx(found["watts_per_gpu"], rel=0.01)
    assert found["ranks"][0]["sent_bytes"]["pp"] > 0


def test_a_small_gpu_does_not_fit(tmp_path, capsys):
    rates = json.loads((FOLDER / "h200.json").read_text())
    path = tmp_path / "small.json"
    path.write_text(json.dumps(rates | {"memory_gib": 0.1}))
    assert plan.main(["--gpu", str(path), *SMALL]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize("name", known_gpus())
def test_every_file_of_rates_says_where_they_come_from(name):
    gpu = load_gpu(name)
    assert gpu.measured and all(gpu.measured.values())


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ("--gpu h3000", ["--gpu h3000", "h200"]),
        ("--gpu none.json", ["--gpu none.json", "no such file"]),
        ("--token-budget many", ["--token-budget many", "15T"]),
        ("--mesh dp=3", ["batch=8", "3 data ranks"]),
        ("--compile off", ["--compile off", "drop"]),
        ("--gpus 4", ["--gpus", "unknown flag"]),
        ("--mesh tp=64", ["tp"]),
    ],
)
def test_what_cannot_be_planned_is_one_line(argv, parts, capsys):
    assert run_cli(plan.main, [*SMALL, *argv.split()]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    for part in parts:
        assert part in line


def test_a_file_that_lacks_a_rate_is_refused(tmp_path):
    path = tmp_path / "half.json"
    path.write_text('{"name": "x"}')
    one_line(lambda: load_gpu(str(path)), "half.json", "not a file of rates", "missing")
