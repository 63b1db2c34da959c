"""The idea in twelve figures on one page of A3; see figures.py, which writes it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape

ROWS = (
    (
        (
            "placements.svg",
            "A mesh is an array of ranks. Rules place every weight of a block on it.",
        ),
        ("course-uneven-shards.svg", "n ranks split s elements into shards of ceil(s / n)."),
        (
            "course-gradient.svg",
            "Tokens are sharded and the scale is whole: its gradient is a pending sum.",
        ),
    ),
    (
        (
            "zero.svg",
            "ZeRO is a row of the rules. Less memory on a rank, and more collectives in a step.",
        ),
        (
            "tensor-parallelism.svg",
            "Columns, then rows: the wide activation never leaves its rank.",
        ),
        ("zigzag.svg", "Early and late tokens on each rank: equal work under a causal mask."),
    ),
    (
        ("ring.svg", "Queries stay, and keys go round: every query sees every key."),
        ("experts.svg", "One mesh in two views. Tokens go to their experts, and back."),
        ("course-schedules.svg", "A schedule is a table. ZB-H1 puts W where 1F1B waits."),
    ),
    (
        (
            "data-and-tensor-parallelism.svg",
            "Two axes at once: each tensor has one placement for each axis.",
        ),
        ("matrix-owners.svg", "An optimizer of whole matrices: each matrix has one owner."),
        ("plan-timeline.svg", "The program of a rank, timed without a GPU."),
    ),
)

STYLE = """
@page { size: A3 landscape; margin: 8mm }
* { box-sizing: border-box }
body { width: 404mm; margin: 0 auto; font: 9pt/1.25 sans-serif; color: #222; background: #fff }
h1 { font-size: 13pt; margin: 0 0 2mm }
h1 small { font-size: 9pt; font-weight: normal }
.row { display: flex; gap: 5mm; margin: 0 auto 2mm; width: 396mm }
figure { margin: 0; min-width: 0 }
img { width: 100%; height: auto; display: block }
figcaption { border-top: 0.3mm solid #999; padding-top: 0.6mm }
"""


def sheet(svgs: Mapping[str, str]) -> str:
    """Return the page. It shows the figures of docs/figures by their names.

    ``svgs``: the figures by file name. In a row, all figures have one scale."""
    rows, number = [], 0
    for row in ROWS:
        cells = []
        for name, caption in row:
            number += 1
            (width,) = re.findall(r'^<svg [^>]*?viewBox="0 0 (\d+)', svgs[name])
            image = f'<img src="figures/{name}" alt="{escape(caption)}"/>'
            text = f"<figcaption><b>{number}</b> {escape(caption)}</figcaption>"
            cells.append(f'<figure style="flex: {width} 1 0">{image}{text}</figure>')
        rows.append("\n".join(['<div class="row">', *cells, "</div>"]))
    head = (
        f'<meta charset="utf-8"/>\n<title>dtron in twelve figures</title>\n<style>{STYLE}</style>\n'
    )
    title = (
        "<h1>dtron in twelve figures <small>A layer is a pure function of its params, its "
        "activations and a layout. One table maps logical axes to mesh axes. Print on A3."
        "</small></h1>"
    )
    body = "\n".join([title, *rows])
    page = f"<head>\n{head}</head>\n<body>\n{body}\n</body>"
    return f"<!DOCTYPE html>\n<html lang='en'>\n{page}\n</html>\n"
