"""The figure of muP in docs/optimizers.md: a coordinate check of two parametrizations."""

from __future__ import annotations

import math

import torch

from dtron.model.config import ModelConfig
from dtron.tools.coordinate_check import CoordinateCheckConfig, Row, coordinate_check
from dtron.tools.drawing import FAINT, Canvas
from dtron.training.optim_config import OptimConfig

TINTS = {
    "embedding.w_tokens": "#222",
    "blocks.*.attention.w_o": "#4a8fd0",
    "blocks.*.mlp.w_down": "#50b060",
    "logits": "#d05050",
}
LOW, HIGH = -3, 1  # powers of ten


def coordinates() -> str:
    """Draw the change of four activations by width, without and with muP."""
    canvas = Canvas(900)
    for panel, base in enumerate((0, 32)):
        config = CoordinateCheckConfig(
            widths="32,64,128,256",
            seq_len=16,
            optim=OptimConfig(lr=1e-2),
            model=ModelConfig(
                vocab=64,
                embed=32,
                layers=2,
                heads=4,
                kv_heads=2,
                head_dim=8,
                mlp=64,
                vocab_multiple=1,
                mup_base_width=base,
            ),
        )
        rows = [r for r in coordinate_check(config, torch.float64) if r.kind == "change"]
        title = f"muP, base width {base}" if base else "standard parametrization"
        canvas.text(70 + panel * 430, 28, title, bold=True, size=16)
        _draw(canvas, 70 + panel * 430, config, {r.name: r for r in rows})
    return canvas.svg()


def _draw(canvas: Canvas, left: float, config: CoordinateCheckConfig, rows: dict[str, Row]) -> None:
    widths = config.sizes
    step = 240 / (len(widths) - 1)

    def down(value: float) -> int:
        """Whole pixels, so that the last bits of a sum do not change the figure."""
        return round(50 + 260 * (HIGH - math.log10(value)) / (HIGH - LOW))

    for power in range(LOW, HIGH + 1):
        canvas.line([(left, down(10.0**power)), (left + 240, down(10.0**power))], "#eee")
        canvas.text(left - 8, down(10.0**power) + 4, f"1e{power}", anchor="end", colour=FAINT)
    for i, width in enumerate(widths):
        canvas.text(left + i * step, 330, str(width), anchor="middle", colour=FAINT)
    canvas.text(left + 120, 350, f"width; change in {config.steps} steps", anchor="middle")
    for line, (name, tint) in enumerate(TINTS.items()):
        row = rows[name]
        canvas.line([(left + i * step, down(v)) for i, v in enumerate(row.values)], tint)
        canvas.rect(left, 368 + 20 * line, 12, 12, tint)
        canvas.text(left + 20, 378 + 20 * line, f"{name}: width^{row.slope:+.1f}")
