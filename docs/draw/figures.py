"""``python docs/draw/figures.py`` draws every figure of the docs into docs/figures/, and twelve of
them on one page, docs/sheet.html.

No figure is drawn by hand. The shards come from the placements of real DTensors on simulated ranks,
and the collectives from a counter of a real step. A test draws the figures too and compares.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import course_figures
import lab_figures
import layer_figures
import torch
from expert_figure import experts
from optimizer_figure import optimizers
from plan_figure import example, plans
from report_figure import losses
from sheet import sheet
from torch import Tensor
from trace_figure import trace
from width_figure import coordinates

from dtron.course.views.context import ring, zigzag
from dtron.course.views.layer import layer
from dtron.course.views.norm_gradient import gradient_of_a_scale
from dtron.course.views.owners import owners
from dtron.course.views.schedules import schedules
from dtron.course.views.zero import legend, zero
from dtron.distributed.mesh_shape import MeshShape
from dtron.layers.attention_mask import AttentionMask, allowed
from dtron.model.config import ModelConfig
from dtron.schedules import Costs
from dtron.tools.drawing import FAINT, Canvas
from dtron.tools.show import picture

FOLDER = Path(__file__).parents[1] / "figures"


def curves() -> str:
    """Draw measured losses, and below the difference of each from the first, as a running mean of
    20 steps."""
    found = json.loads((FOLDER.parent.parent / "bench" / "results" / "curves.json").read_text())
    losses = found["losses"]
    steps, first = len(next(iter(losses.values()))), next(iter(losses))
    tints = dict(zip(losses, ("#222", "#4a8fd0", "#50b060", "#d05050", "#d0a050"), strict=True))
    canvas = Canvas(1180)

    def across(step: int) -> float:
        return 70 + 1000 * step / (steps - 1)

    where = f"{found['device']}, torch {found['torch']}"
    title = f"The same {steps} steps, computed in {len(losses)} ways ({where})"
    canvas.text(20, 28, title, bold=True, size=16)
    low, high = min(map(min, losses.values())), max(map(max, losses.values()))

    def down(loss: float) -> float:
        return 60 + 240 * (high - loss) / (high - low)

    for loss in range(math.ceil(low), math.floor(high) + 1):
        canvas.text(60, down(loss) + 4, f"{loss}", anchor="end", colour=FAINT)
        canvas.line([(70, down(loss)), (1070, down(loss))], "#eee")
    for name, values in losses.items():
        canvas.line([(across(i), down(loss)) for i, loss in enumerate(values)], tints[name])
    canvas.text(20, 340, f"Difference from {first}, mean of 20 steps", bold=True)

    def off(share: float) -> float:
        return 430 - 60 * share / 0.01

    for share in (-0.01, 0.0, 0.01):
        canvas.text(60, off(share) + 4, f"{share:+.0%}", anchor="end", colour=FAINT)
        canvas.line([(70, off(share)), (1070, off(share))], "#eee")
    for name, values in losses.items():
        means = [
            (sum(a) / sum(b) - 1)
            for a, b in zip(windows(values), windows(losses[first]), strict=True)
        ]
        canvas.line([(across(i + 19), off(mean)) for i, mean in enumerate(means)], tints[name])
    for row, (name, tint) in enumerate(tints.items()):
        canvas.rect(880, 60 + 20 * row, 14, 14, tint)
        canvas.text(900, 72 + 20 * row, name)
    return canvas.svg()


def windows(values: list[float]) -> list[list[float]]:
    return [values[i : i + 20] for i in range(len(values) - 19)]


def masks() -> str:
    """Draw attention masks, from the mask function of the reference. Below, for longer sequences:
    the blocks of 128 by 128 that flex skips, computes without a mask, or computes with a mask."""
    small, long, block = 16, 2048, 128
    kinds = [
        ("causal", None, ()),
        ("window of 5", 5, ()),
        ("three documents", None, (0.35, 0.7)),
        ("both", 5, (0.35, 0.7)),
    ]
    canvas, cell = Canvas(900), 12
    fills = {"empty": "#f2f2f2", "full": "#4a8fd0", "some": "#a8cbec"}

    def draw_square(x: float, y: float, filled: list[list[str]]) -> None:
        canvas.rect(x, y, cell * len(filled), cell * len(filled), fills["empty"], line="#fff")
        for i, row in enumerate(filled):
            for j, kind in enumerate(row):
                if kind == "empty":
                    continue
                canvas.rect(x + j * cell, y + i * cell, cell, cell, fills[kind], line="#fff")

    def seen(seq_len: int, window: int | None, cuts: tuple[float, ...]) -> Tensor:
        place = torch.arange(seq_len) / seq_len
        documents = sum((place >= cut).long() for cut in cuts)[None] if cuts else None
        return allowed(AttentionMask(seq_len, window), documents, place.device)[0, 0]

    canvas.text(20, 24, f"{small} tokens: the query of each row sees the keys in blue", bold=True)
    canvas.text(20, 264, f"{long} tokens in blocks of {block} (window of {5 * 64})", bold=True)
    for n, (name, window, cuts) in enumerate(kinds):
        x = 20 + n * 216
        canvas.text(x, 44, name, colour=FAINT)
        pairs = seen(small, window, cuts)
        draw_square(x, 52, [["full" if ok else "empty" for ok in row] for row in pairs])
        pairs = seen(long, window and window * 64, cuts)
        blocks = pairs.unflatten(0, (-1, block)).unflatten(2, (-1, block))
        any_, all_ = blocks.any(3).any(1), blocks.all(3).all(1)
        kinds_of_blocks = [
            ["full" if full else "some" if some else "empty" for some, full in zip(*row)]
            for row in zip(any_, all_)
        ]
        draw_square(x, 274, kinds_of_blocks)
        canvas.text(x, 486, f"{any_.float().mean():.0%} of all blocks", colour=FAINT)
    legend(canvas, 20, 504, [("skipped", fills["empty"]), ("some pairs", fills["some"])])
    legend(canvas, 280, 504, [("all pairs", fills["full"])])
    return canvas.svg()


def figures() -> dict[str, str]:
    """Return every figure by file name, but for those of a plan."""
    return {
        "experts.svg": experts(MeshShape(dp=4, tp=2, ep=4)),
        "placements.svg": picture(ModelConfig(), MeshShape(dp=2, tp=2), 1),
        "zero.svg": zero(MeshShape(dp=8), MeshShape(dp=2)),
        "tensor-parallelism.svg": layer(MeshShape(tp=4)),
        "data-and-tensor-parallelism.svg": layer(MeshShape(dp=2, tp=2)),
        "latent-attention.svg": layer_figures.latent(MeshShape(tp=4)),
        "masks.svg": masks(),
        "schedules.svg": schedules(4, 8, Costs()),
        "losses.svg": curves(),
        "report-loss.svg": losses(),
        "zigzag.svg": zigzag(),
        "ring.svg": ring(),
        "matrix-owners.svg": owners(MeshShape(dp=2, tp=2), ModelConfig(layers=3)),
        "coordinate-check.svg": coordinates(),
        "adamw-and-muon.svg": optimizers("gpt2-124m"),
        "adamw-and-muon-tiny.svg": optimizers("tiny"),
        "course-uneven-shards.svg": course_figures.uneven_shards(MeshShape(dp=2, tp=2)),
        "course-schedules.svg": schedules(4, 8, Costs(), ("1f1b", "zb-h1")),
        "course-gradient.svg": gradient_of_a_scale(MeshShape(dp=2, tp=2)),
        "course-experts.svg": lab_figures.slots_and_rows(),
        "course-numbers.svg": lab_figures.casts(),
        "course-trace.svg": trace(),
        "course-own-layer.svg": lab_figures.own_layer(3, (5, 16)),
        "costs.svg": schedules(4, 8, Costs(1.0, 1.2, 0.8, 0.1)),
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    drawn = figures() | plans(example())
    for name, svg in drawn.items():
        (FOLDER / name).write_text(svg)
        print(FOLDER / name)
    (FOLDER.parent / "sheet.html").write_text(sheet(drawn))
    print(FOLDER.parent / "sheet.html")
