"""Train the same 200 steps in several precisions and write the losses to bench/results/curves.json.

    python bench/curves.py                      # then draw them: python docs/draw/figures.py
    python bench/curves.py --steps 20 --device cpu --out /tmp/curves.json

Each way starts train.py as a user would, with the default model, text and seed. FP8 converts every
block here; by default it would leave blocks of this small model in high precision. All ways run at
the same time, because nothing is timed. Needs the dependencies of train.py."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
COMPILED = ["--dtype", "bfloat16", "--compile", "on"]
FP8 = [*COMPILED, "--fp8-first-last", "--fp8-min-weights", "0"]
WAYS = {
    "float32, eager": ["--dtype", "float32", "--compile", "off"],
    "bfloat16, eager": ["--dtype", "bfloat16", "--compile", "off"],
    "bfloat16, compiled": COMPILED,
    "FP8 tensorwise, compiled": [*FP8, "--fp8", "tensorwise"],
    "FP8 rowwise, compiled": [*FP8, "--fp8", "rowwise"],
}


def main() -> None:
    p = argparse.ArgumentParser(
        description="Train the same steps in several precisions and write the losses."
    )
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--device", default="auto")
    p.add_argument("--out", default=str(ROOT / "bench" / "results" / "curves.json"))
    o = p.parse_args()
    with ThreadPoolExecutor(len(WAYS)) as at_once:
        results = at_once.map(partial(curve, o=o), WAYS.values())
        losses = dict(zip(WAYS, results, strict=True))
    on_gpu = o.device != "cpu" and torch.cuda.is_available()
    where = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
    }
    Path(o.out).write_text(
        json.dumps({**where, "date": str(date.today()), "losses": losses}) + "\n"
    )
    for name, values in losses.items():
        print(f"{name:26}  first {values[0]:.4f}  mean of the last 20 {sum(values[-20:]) / 20:.4f}")


def curve(flags: list[str], o: argparse.Namespace) -> list[float]:
    """Train with these flags and return the loss of each step."""
    with tempfile.TemporaryDirectory() as folder:
        common = f"--steps={o.steps} --device={o.device} --sample-tokens=0 --eval-every=0".split()
        run_dir = f"--run-dir={folder}"
        command = [sys.executable, str(ROOT / "train.py"), *common, run_dir, *flags]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        return [
            json.loads(row)["loss"]
            for row in (Path(folder) / "metrics.jsonl").read_text().splitlines()
        ]


if __name__ == "__main__":
    main()
