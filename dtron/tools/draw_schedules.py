"""Schedules as pictures, in text and SVG: one line per rank, time to the right.

F is blue, B and I are green, W is orange; a rank's second stage is paler than its first, as in the
papers' figures. A number is the microbatch. Everything is read off a ``Timeline``, so what is drawn
is what was timed."""

from __future__ import annotations

import colorsys

from dtron.schedules.table import Action, Timeline
from dtron.tools.svg import FAINT, Canvas

HUES = {"F": 0.60, "B": 0.40, "I": 0.40, "W": 0.09}
NAMES = (("F", "forward"), ("B", "backward"), ("I", "input gradient"), ("W", "weight gradient"))


def colour(action: Action, per_rank: int, ranks: int) -> str:
    chunk = action.stage // ranks
    light = 0.52 + 0.3 * chunk / max(per_rank - 1, 1) if per_rank > 1 else 0.6
    r, g, b = colorsys.hls_to_rgb(HUES[action.kind], light, 0.55)
    return f"#{int(r * 255):02x}{int(g * 255):02x}{int(b * 255):02x}"


def text(line: Timeline, unit: float | None = None) -> str:
    """A character grid: ``unit`` of time is one cell of three characters (None: the shortest
    action)."""
    unit = unit or min(end - start for spans in line.spans for _, start, end in spans)
    rows = []
    for rank, spans in enumerate(line.spans):
        row = ""
        for a, start, end in spans:
            row = row.ljust(3 * round(start / unit))
            cells = max(1, round((end - start) / unit))
            row += f"{a.kind}{a.microbatch}".ljust(3)[: 3 * cells].ljust(
                3 * cells, "-" if cells > 1 else " "
            )
        rows.append(f"rank {rank:<2} {row.rstrip()}")
    return "\n".join(rows)


def draw(canvas: Canvas, x: float, y: float, line: Timeline, width: float, longest: float) -> float:
    """Draw a timeline at (x, y), ``longest`` units of time being ``width`` wide; returns its lower
    end."""
    scale, height = width / longest, 20
    ranks = len(line.table.rows)
    for rank, spans in enumerate(line.spans):
        top = y + rank * (height + 2)
        canvas.text(x - 8, top + 14, str(rank), anchor="end", colour=FAINT)
        for a, start, end in spans:
            left, wide = x + start * scale, (end - start) * scale
            fill = colour(a, line.table.per_rank, ranks)
            canvas.rect(left, top, wide, height, fill, line="#fff")
            if wide >= 6.5 * len(str(a.microbatch)):
                canvas.text(left + wide / 2, top + 14, str(a.microbatch), size=10, anchor="middle")
    return y + ranks * (height + 2)


def svg(lines: dict[str, Timeline], width: float = 1180) -> str:
    """Timelines one below the other, on one scale of time, each with its title."""
    canvas, y = Canvas(width), 10.0
    longest = max(line.makespan for line in lines.values())
    for title, line in lines.items():
        canvas.text(20, y + 14, title, bold=True, size=14)
        y = draw(canvas, 48, y + 26, line, width - 68, longest) + 14
    for i, (kind, name) in enumerate(NAMES):
        canvas.rect(48 + 170 * i, y, 14, 14, colour(Action(kind, 0, 0), 1, 1))
        canvas.text(68 + 170 * i, y + 12, f"{kind}: {name}")
    return canvas.svg()
