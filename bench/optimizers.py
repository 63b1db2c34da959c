"""Train a model with AdamW at several rates, and with Muon in fewer steps, and compare the losses.

    python bench/optimizers.py                                 # the default model and text
    python bench/optimizers.py --name gpt2-124m --flags '--model gpt2-124m --data.path code ...'
    python bench/optimizers.py --steps 20 --share 0.75 --device cpu --at-once 1 --out /tmp/o.json

The question is how many steps Muon needs for the validation loss that AdamW ends with. AdamW trains
``--steps`` steps at each of its rates, and its best rate counts. Muon trains ``--share`` of these
steps at each of its rates, with a schedule that ends there. In the middle of a longer run the rate
would still be high, and so would the loss. Each run is one of train.py, with the same seed. So both
optimizers begin with the same weights and read the same samples.

First a run of ``--timed`` steps with each optimizer measures the time of a step, and fills the
cache of compiled code. Then ``--at-once`` runs share the device. bench/results/optimizers.json gets
an entry for each ``--name``, which python docs/draw/figures.py draws. Needs the dependencies of
train.py."""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from dtron.errors import UserError
from dtron.runtime.exit import Parser, run_cli

ROOT = Path(__file__).resolve().parents[1]
Curve = list[tuple[int, float]]
"""Steps, and the validation loss after each."""


@dataclass(frozen=True)
class Trial:
    """An optimizer, its rate and its number of steps."""

    optimizer: str
    rate: float
    steps: int

    def __str__(self) -> str:
        return f"{self.optimizer} {self.rate:g}"


def main(argv: list[str]) -> int:
    o = arguments(argv)
    times = {name: step_ms(train(Trial(name, 1e-3, o.timed), o)) for name in ("muon", "adamw")}
    trials = [Trial("adamw", rate, o.steps) for rate in o.adamw]
    trials += [Trial("muon", rate, round(o.share * o.steps)) for rate in o.muon]
    curves: dict[Trial, Curve] = {}
    with ThreadPoolExecutor(o.at_once) as at_once:
        started = {at_once.submit(train, trial, o): trial for trial in reversed(trials)}
        for run in as_completed(started):
            curves[started[run]] = validation(run.result())
            save(o, times, curves)
            print(f"{started[run]}: {curves[started[run]][-1][1]:.4f}", flush=True)
    last = {trial: curves[trial][-1][1] for trial in trials}
    adamw, muon = (
        min((t for t in trials if t.optimizer == name), key=lambda t: last[t])
        for name in ("adamw", "muon")
    )
    for trial in trials:
        mark = "best" if trial in (adamw, muon) else ""
        print(f"{trial!s:16} {trial.steps:6,} steps  validation loss {last[trial]:.4f}  {mark}")
    reaches = "reaches" if last[muon] <= last[adamw] else "does not reach"
    time = times["muon"] * muon.steps / (times["adamw"] * adamw.steps)
    print(
        f"muon {reaches} adamw's loss in {o.share:.2f} of its steps and {time:.2f} of its time "
        f"({times['muon']:.1f} and {times['adamw']:.1f} ms a step)"
    )
    return 0


def arguments(argv: list[str]) -> argparse.Namespace:
    p = Parser(description="Compare AdamW at several rates with Muon in fewer steps.")
    p.add_argument("--name", default="tiny", help="name of the entry in the results")
    p.add_argument("--flags", default="", help="flags of train.py for all runs")
    p.add_argument("--steps", type=int, default=2000, help="steps of AdamW")
    p.add_argument("--share", type=float, default=0.75, help="steps of Muon, as a share")
    p.add_argument("--adamw", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2])
    p.add_argument("--muon", type=float, nargs="+", default=[4e-3, 8e-3, 1.6e-2])
    p.add_argument("--at-once", type=int, default=4, help="runs at the same time")
    p.add_argument("--timed", type=int, default=100, help="steps of a run for the time of a step")
    p.add_argument("--device", default="auto")
    p.add_argument("--out", default=str(ROOT / "bench" / "results" / "optimizers.json"))
    return p.parse_args(argv)


def train(trial: Trial, o: argparse.Namespace) -> list[dict[str, Any]]:
    """Train with an optimizer and return the records of metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--steps={trial.steps} --optim.name={trial.optimizer} --optim.lr={trial.rate}"
        common = f"--device={o.device} --sample-tokens=0 --run-dir={folder} --eval-every=250"
        command = [sys.executable, str(ROOT / "train.py"), *shlex.split(o.flags)]
        command += [*flags.split(), *common.split()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise UserError(f"{trial}: train.py failed ({why}); change --flags")
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def save(o: argparse.Namespace, times: dict[str, float], curves: dict[Trial, Curve]) -> None:
    """Write the curves that are known so far, so that a run that is stopped has them."""
    on_gpu = o.device != "cpu" and torch.cuda.is_available()
    entry = {
        "flags": o.flags,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "date": str(date.today()),
        "step_ms": times,
        "runs": [{**vars(trial), "validation": curve} for trial, curve in curves.items()],
    }
    out = Path(o.out)
    results = json.loads(out.read_text()) if out.exists() else {}
    out.write_text(json.dumps({**results, o.name: entry}) + "\n")


def validation(rows: list[dict[str, Any]]) -> Curve:
    """Return the steps at which the validation loss was measured, and the losses."""
    return [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]


def step_ms(rows: list[dict[str, Any]]) -> float:
    """Return the median time of the second half of the steps."""
    return 1000 * statistics.median(row["step_seconds"] for row in rows[len(rows) // 2 :])


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
