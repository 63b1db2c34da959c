"""The figure of docs/monitoring.md: a chart of a report. ``report_runs.json`` has the losses of two
small runs, and their commands."""

from __future__ import annotations

import json
from pathlib import Path

from dtron.tools.curve_chart import curve_chart
from dtron.tools.curves import METRICS, Curve
from dtron.tools.html_page import LINE_THEME, THEME, line_colour

RESULTS = Path(__file__).with_name("report_runs.json")


def losses() -> str:
    """Draw the losses of two runs as a report does, with a legend."""
    measured = json.loads(RESULTS.read_text())["losses"]
    runs: dict[str, Curve] = {}
    for name, found in measured.items():
        points = list(enumerate(found, 1))
        runs[name] = Curve(points, points)
    canvas = curve_chart(METRICS[0], runs, width=900, height=260)
    assert canvas is not None
    y = canvas.height + 22
    for i, name in enumerate(runs):
        x = 62 + 160 * i
        canvas.line([(x, y - 4), (x + 18, y - 4)], line_colour(i))
        canvas.text(x + 26, y, name)
    hidden = "g[data-kind=smooth]{display:none}"
    return canvas.svg(f"{THEME}{LINE_THEME}\n{hidden}")
