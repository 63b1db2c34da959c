"""Draws runs as one page of HTML: curves over steps, summaries and configs.

    dtron report runs/a
    dtron report runs/a runs/b -o report.html

The page is one file and needs no network. It is made from the files of the run directories
(run_record.py), so a run that still trains, or was interrupted, has a page too.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from dtron import __version__
from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.runtime.config_file import toml_text
from dtron.runtime.exit import Parser
from dtron.tools import html_page as html
from dtron.tools.curve_chart import SCRIPT, STYLE, curve_chart, is_dashed
from dtron.tools.curves import METRICS
from dtron.tools.run_record import (
    RunRecord,
    count_text,
    differences,
    read_records,
    time_text,
)
from dtron.tools.show import rows as weight_rows

NAME = "report.html"
LONG = 200  # steps from which on curves are smoothed at first
SMOOTHED = "smoothed curves, over the recorded numbers"


def report_page(runs: Sequence[RunRecord], argv: Sequence[str]) -> str:
    """Return the page of runs.

    ``argv``: the arguments of the command."""
    one = len(runs) == 1
    title = f"Run {runs[0].name}" if one else f"{len(runs)} runs"
    lead = [html.paragraph(f"dtron {__version__},", shlex.join(["dtron", "report", *argv]))]
    lead.append(html.cards(_cards(runs[0])) if one else _summary(runs))
    sections = [_curves(runs)]
    if not one:
        sections.append(_differences(runs))
    sections += [_starts(runs), _meshes(runs), _configs(runs)]
    return html.page(title, lead, sections, html.LINE_THEME + STYLE, SCRIPT)


def _cards(run: RunRecord) -> list[tuple[str, str, str]]:
    best, median = run.best_validation, run.tokens_per_s
    found = [(run.state, f"mesh {run.mesh}" if run.mesh else "one device", "")]
    found.append((_number(run.last.get("loss")), "last loss", ""))
    if best:
        found.append((_number(best[0]), f"best validation loss, step {best[1]:,}", ""))
    speed = "" if median is None else f", {count_text(median)} a second (median)"
    found.append((count_text(run.last.get("tokens", 0)), f"tokens{speed}", ""))
    return [*found, (time_text(run.hours), "in training steps", "")]


def _summary(runs: Sequence[RunRecord]) -> str:
    headers = ("run", "progress", "last loss", "best validation loss", "at step", "tokens")
    headers += ("time in steps", "tokens/s, median")
    rows = []
    for run in runs:
        best, median = run.best_validation, run.tokens_per_s
        cells = [run.name, run.state, _number(run.last.get("loss"))]
        cells += [_number(best[0]), f"{best[1]:,}"] if best else ["", ""]
        cells += [count_text(run.last.get("tokens", 0)), time_text(run.hours)]
        rows.append([*cells, "" if median is None else count_text(median)])
    return html.table(headers, rows, right=range(1, len(headers)))


def _curves(runs: Sequence[RunRecord]) -> str:
    drawn, smoothed = [], False
    for metric in METRICS:
        chart = curve_chart(metric, {run.name: run.curves[metric.name] for run in runs})
        if chart is not None:
            smoothed |= metric.smooth
            drawn.append(html.drawing(chart, f"{metric.title} over steps"))
    if not drawn:
        return html.section("Curves", "No step is recorded yet.")
    long = any(run.steps > LONG for run in runs)
    box = '<input type="checkbox" id="smooth"' + (' checked="checked"/>' if long else "/>")
    toggle = f'<p class="faint"><label>{box}{SMOOTHED}</label></p>' if smoothed else ""
    text = "Over steps. The pointer over a chart shows the numbers of a step."
    legend = _legend(runs) if len(runs) > 1 else ""
    grid = f'<div class="curves">{"".join(drawn)}</div>'
    return html.section("Curves", text, legend, toggle, grid)


def _legend(runs: Sequence[RunRecord]) -> str:
    def entry(i: int, name: str) -> str:
        colour, kind = html.line_colour(i), "line dashed" if is_dashed(i) else "line"
        return f'<li><i class="{kind}" style="--line:{colour}"></i>{escape(name)}</li>'

    return f'<ul class="legend">{"".join(entry(i, r.name) for i, r in enumerate(runs))}</ul>'


def _differences(runs: Sequence[RunRecord]) -> str:
    found = differences(runs)
    if not found:
        return html.section("Differences", "The configs of the runs are equal.")
    rows = [
        [f"--{name.replace('_', '-')}", *(str(x) if x != "" else "''" for x in row)]
        for name, row in found.items()
    ]
    headers = ["flag", *(run.name for run in runs)]
    text = "The values of the configs in which the runs differ."
    return html.section("Differences", text, html.table(headers, rows, code=(0,)))


def _starts(runs: Sequence[RunRecord]) -> str:
    names = list(dict.fromkeys(name for run in runs for x in run.starts for name in x))
    headers = ["run", *names]
    rows = [[run.name, *(_cell(x.get(name)) for name in names)] for run in runs for x in run.starts]
    text = "Each start of a run: when, after which step, and with which versions."
    if not rows:
        return html.section("Starts", "The run directories have no record of a start.")
    return html.section("Starts", text, html.table(headers, rows))


def _cell(value: object) -> str:
    return "" if value is None else str(value)


def _meshes(runs: Sequence[RunRecord]) -> str:
    text = "The placement of every weight on the mesh, as the rules of this version of dtron say."
    parts = [html.folded(f"{run.name}: {_mesh_text(run)}", _placements(run)) for run in runs]
    return html.section("Mesh and placements", text, *parts)


def _mesh_text(run: RunRecord) -> str:
    return f"mesh {run.mesh or 'of one device'}, ZeRO {run.config.zero}"


def _placements(run: RunRecord) -> str:
    try:
        shape = MeshShape.parse(run.mesh)
        found = weight_rows(run.config.model, shape, run.config.zero, optim=run.config.optim)
    except UserError as error:
        return html.paragraph(str(error))
    headers = ("weight", "axes", "placement", "shape", "on one rank")
    by = lambda sizes: " x ".join(map(str, sizes))
    rows = [(x.path, x.axes, x.placement, by(x.shape), by(x.local)) for x in found]
    return html.table(headers, rows)


def _configs(runs: Iterable[RunRecord]) -> str:
    text = "The resolved config of each run, as --config reads it."
    parts = [
        html.folded(run.name, f"<pre>{escape(toml_text(asdict(run.config)))}</pre>") for run in runs
    ]
    return html.section("Configs", text, *parts)


def _number(x: object) -> str:
    return f"{x:.4f}" if isinstance(x, int | float) else ""


def main(argv: list[str]) -> int:
    parser = Parser(prog="dtron report", description="Draw runs as one page of HTML.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run directory")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help=f"the page; {NAME} in the first run by default"
    )
    o = parser.parse_args(argv)
    runs = read_records(o.runs)
    output = o.output if o.output is not None else str(Path(o.runs[0]) / NAME)
    html.check_output("--output", output)
    html.write_page("--output", output, report_page(runs, argv))
    print(f"drawn to {output}")
    return 0
