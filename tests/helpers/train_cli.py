"""Run train.py in this process from a command line, and read its log."""

import json
import re
from pathlib import Path

import pytest

import train
from dtron.runtime.exit import run_cli

TINY = [
    "--model.layers=1",
    "--model.embed=32",
    "--model.heads=2",
    "--model.kv-heads=2",
    "--model.vocab=300",
]
TINY += ["--model.head-dim=16", "--model.mlp=64", "--data.seq-len=16", "--data.path=corpus.jsonl"]
TINY += ["--device=cpu", "--batch=4", "--steps=4", "--sample-tokens=5"]
TINY += [
    "--optim.lr=5e-3",
    "--optim.warmup=1",
]  # so large that a wrong step shows in the next loss
SIX = ["--steps=6", "--eval-every=0", "--sample-tokens=0", "--save-every=2"]
MANY = ["--simulate", "--mesh=dp=2,tp=2", "--zero=3"]
KEYS = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "tflops_per_device", "mfu"}
KEYS |= {"peak_memory_gib", "step_seconds", "data_wait_ratio", "skipped_steps", "samples"}


def enter(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Prepare a run of one process: in the folder of the text, with a cache of its own."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        patch.delenv(name, raising=False)
    patch.setenv("DTRON_CACHE", str(folder / "cache"))
    patch.chdir(folder)


def run(run_dir: Path, *argv: str, code: int = 0) -> list[dict]:
    """Run train.py, which must end with an exit code, and return the records of metrics.jsonl."""
    assert run_cli(train.main, [*TINY, f"--run-dir={run_dir}", *argv]) == code
    return records(run_dir)


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(found: list[dict]) -> list[float]:
    return [record["loss"] for record in found]


def agree(found: list[dict], want: list[float]) -> None:
    assert [record["step"] for record in found] == [1, 2, 3, 4]
    assert losses(found) == pytest.approx(want, rel=1e-5)


def refused(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert run_cli(train.main, [*TINY, *argv]) == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(r"error: [^\n]+\n", err) and not out
    return err
