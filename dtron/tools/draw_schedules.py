"""Draws pipeline schedules in text and SVG: one line per rank, time to the right.

F is blue, B and I are green, W is orange. A rank's second stage is paler than its first, as in the
figures of the papers. The number on an action is its microbatch. The input is a ``Timeline``, so
the picture shows the simulated times."""

from __future__ import annotations

import colorsys

from dtron.errors import UserError
from dtron.schedules.table import Action, Timeline
from dtron.tools.svg import FAINT, Canvas

HUES = {"F": 0.60, "B": 0.47, "I": 0.30, "W": 0.09}
_MOST_CELLS = 1 << 16  # in a row of text
NAMES = (("F", "forward"), ("B", "backward"), ("I", "input gradient"), ("W", "weight gradient"))


def colour(action: Action, per_rank: int, ranks: int) -> str:
    chunk = action.stage // ranks
    light = 0.52 + 0.3 * chunk / max(per_rank - 1, 1) if per_rank > 1 else 0.6
    r, g, b = colorsys.hls_to_rgb(HUES[action.kind], light, 0.55)
    return f"#{int(r * 255):02x}{int(g * 255):02x}{int(b * 255):02x}"


def text(line: Timeline, unit: float | None = None) -> str:
    """Return a timeline as a character grid.

    ``unit``: the time of one cell of three characters (None: the shortest action)."""
    times = [end - start for spans in line.spans for _, start, end in spans]
    unit = unit or min(time for time in times if time > 0)
    if line.makespan > _MOST_CELLS * unit:
        raise UserError(
            f"times from {unit:g} to {line.makespan:g} have no room in a picture of text; take "
            "times that differ less, or draw to a file with -o"
        )
    rows = []
    for rank, spans in enumerate(line.spans):
        row = ""
        for a, start, end in spans:
            row = row.ljust(3 * round(start / unit))
            cells = max(1, round((end - start) / unit))
            label = f"{a.kind}{a.microbatch}".ljust(3)[: 3 * cells]
            row += label.ljust(3 * cells, "-" if cells > 1 else " ")
        rows.append(f"rank {rank:<2} {row.rstrip()}")
    return "\n".join(rows)


def draw(canvas: Canvas, x: float, y: float, line: Timeline, width: float, longest: float) -> float:
    """Draw a timeline at (x, y) and return its lower end. ``longest`` units of time have the width
    ``width``."""
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
    """Return a picture of several timelines by title, on one scale of time."""
    canvas, y = Canvas(width), 10.0
    longest = max(line.makespan for line in lines.values())
    for title, line in lines.items():
        canvas.text(20, y + 14, title, bold=True, size=14)
        y = draw(canvas, 48, y + 26, line, width - 68, longest) + 14
    for i, (kind, name) in enumerate(NAMES):
        canvas.rect(48 + 170 * i, y, 14, 14, colour(Action(kind, 0, 0), 1, 1))
        canvas.text(68 + 170 * i, y + 12, f"{kind}: {name}")
    return canvas.svg()
