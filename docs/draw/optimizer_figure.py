"""The figure of AdamW and Muon, from the results of bench/optimizers.py; see figures.py."""

from __future__ import annotations

import json
import math
from pathlib import Path

from dtron.tools.drawing import FAINT, Canvas

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "optimizers.json"
TINTS = {"adamw": ("#4a8fd0", "#c4dcf2"), "muon": ("#d05050", "#f0c4c4")}
"""The colours of an optimizer's best rate and of its other rates."""


def optimizers(name: str) -> str:
    """Draw validation losses over steps at each rate. ``name``: the entry of the results."""
    found = json.loads(RESULTS.read_text())[name]
    runs = sorted(found["runs"], key=lambda run: run["validation"][-1][1], reverse=True)
    best = {run["optimizer"]: run for run in runs}  # the last one is the lowest
    steps = max(run["steps"] for run in runs)
    losses = [loss for run in runs for _, loss in run["validation"]]
    low, high = min(losses), max(losses)
    canvas = Canvas(1180)

    def place(step: int, loss: float) -> tuple[float, float]:
        return 70 + 840 * step / steps, 60 + 320 * (high - loss) / (high - low)

    where = f"{found['device']}, torch {found['torch']}"
    canvas.text(20, 28, f"Validation loss of {name} over steps ({where})", bold=True, size=16)
    for loss in range(math.ceil(low), math.floor(high) + 1):
        x, y = place(0, loss)
        canvas.text(x - 10, y + 4, f"{loss}", anchor="end", colour=FAINT)
        canvas.line([(x, y), place(steps, loss)], "#eee")
    for step in range(0, steps + 1, 500):
        canvas.text(place(step, low)[0], 400, f"{step:,}", anchor="middle", colour=FAINT)
    for run in runs:
        is_best = run is best[run["optimizer"]]
        tint = TINTS[run["optimizer"]][0 if is_best else 1]
        canvas.line([place(step, loss) for step, loss in run["validation"]], tint)
    end = best["adamw"]["validation"][-1]
    canvas.line([place(0, end[1]), place(*end)], TINTS["adamw"][0], dashed=True)
    for row, run in enumerate(runs):
        is_best = run is best[run["optimizer"]]
        canvas.rect(940, 60 + 22 * row, 14, 14, TINTS[run["optimizer"]][0 if is_best else 1])
        label = f"{run['optimizer']} {run['rate']:g}: {run['validation'][-1][1]:.3f}"
        canvas.text(960, 72 + 22 * row, label, bold=is_best)
    return canvas.svg()
