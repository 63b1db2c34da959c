"""Does it still learn the same? The same 200 steps in several ways of computing, into
bench/curves.json.

    python bench/curves.py                      # and then python docs/draw/figures.py draws them
    python bench/curves.py --steps 20 --device cpu --out /tmp/curves.json

Each way is train.py as a user would start it, with the default model, text and seed. FP8 is made to
convert every block of this small model, which a run for speed would leave alone. All run at once:
nothing is timed. Needs what train.py needs."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
FP8 = ["--fp8-first-last", "--fp8-min-weights", "0"]
WAYS = {
    "float32, eager": ["--dtype", "float32", "--compile", "off"],
    "bfloat16, eager": ["--dtype", "bfloat16", "--compile", "off"],
    "bfloat16, compiled": ["--dtype", "bfloat16", "--compile", "on"],
    "FP8 tensorwise, compiled": [
        "--dtype",
        "bfloat16",
        "--compile",
        "on",
        "--fp8",
        "tensorwise",
        *FP8,
    ],
    "FP8 rowwise, compiled": ["--dtype", "bfloat16", "--compile", "on", "--fp8", "rowwise", *FP8],
}


def main() -> None:
    p = argparse.ArgumentParser(
        description="Loss curves of the same steps, computed in several ways."
    )
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--device", default="auto")
    p.add_argument("--out", default=str(ROOT / "bench" / "curves.json"))
    o = p.parse_args()
    with ThreadPoolExecutor(len(WAYS)) as at_once:
        losses = dict(
            zip(WAYS, at_once.map(lambda flags: curve(flags, o), WAYS.values()), strict=True)
        )
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


def curve(flags: list[str], o) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        common = [
            "--steps",
            o.steps,
            "--device",
            o.device,
            "--run-dir",
            folder,
            "--sample-tokens",
            0,
            "--eval-every",
            0,
        ]
        command = [sys.executable, ROOT / "train.py", *common, *flags]
        subprocess.run([*map(str, command)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        return [
            json.loads(row)["loss"]
            for row in (Path(folder) / "metrics.jsonl").read_text().splitlines()
        ]


if __name__ == "__main__":
    main()
