"""Charts of curves over steps, of one run or several runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dtron.tools.charts import tick_text
from dtron.tools.curves import Curve, Metric, Point, segments, smooth, thin
from dtron.tools.html_page import COLOURS, FAINT, INK, PAPER, RULE, line_colour
from dtron.tools.svg import Canvas

STYLE = """
.curves{display:grid;gap:14px 24px;
  grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr))}
.curves svg{min-width:0} .curves svg>polyline{stroke-width:1} .curves .wide{overflow:visible}
#smooth{margin:0 6px 0 0} g[data-kind=raw] polyline{stroke-width:1.3}
g[data-kind=smooth]{display:none} g[data-kind=smooth] polyline{stroke-width:2}
body:has(#smooth:checked) g[data-kind=smooth]{display:inline}
body:has(#smooth:checked) g[data-smoothed] polyline{opacity:.28}
.curves .mark:hover{opacity:1} .curves svg{touch-action:pan-y}
pre{background:var(--panel);border-radius:8px;padding:10px 16px;overflow-x:auto;font-size:12.5px}
details{margin:6px 0} .legend i.line{height:3px;vertical-align:3px;background:var(--line)}
.legend i.dashed{background:repeating-linear-gradient(90deg,var(--line) 0 4px,transparent 4px 6px)}
"""
# Shows the numbers of all curves at the step under the pointer. No "less than" and no "and".
SCRIPT = """
let cursor = null;
function nearest(steps, wanted) {
  let best = 0;
  steps.forEach((step, i) => {
    if (Math.abs(steps[best] - wanted) > Math.abs(step - wanted)) best = i;
  });
  return best;
}
function text(value) {
  if (value === null) return "not finite";
  return value.toLocaleString("en", {maximumSignificantDigits: 6});
}
document.addEventListener("pointermove", (event) => {
  if (cursor !== null) cursor.remove();
  cursor = null;
  const svg = event.target.closest ? event.target.closest(".curves svg") : null;
  const plot = svg === null ? null : svg.querySelector("[data-first]");
  if (plot === null) return;
  const {left, right, top, bottom, first, last} = plot.dataset;
  const box = svg.getBoundingClientRect();
  const x = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
  if (Number(left) > x || x > Number(right)) return;
  const share = (x - left) / (right - left);
  const curves = [...svg.querySelectorAll("[data-values]")].map((curve) => {
    const steps = JSON.parse(curve.dataset.steps);
    const i = nearest(steps, Number(first) + share * (last - first));
    return [curve.dataset.run, steps[i], JSON.parse(curve.dataset.values)[i]];
  });
  const at = curves[0][1];
  const lines = curves.map(([run, step, value]) =>
    `${run}: ${text(value)}${step === at ? "" : ` (step ${text(step)})`}`);
  tip.hidden = false;
  tip.textContent = [`step ${text(at)}`, ...lines].join("\\n");
  const span = last - first || 1;
  const place = Number(left) + (at - first) / span * (right - left);
  cursor = document.createElementNS(svg.namespaceURI, "path");
  cursor.setAttribute("d", `M${place} ${top}V${bottom}`);
  cursor.setAttribute("stroke", "var(--faint)");
  svg.append(cursor);
  const beside = event.clientX + 14 + tip.offsetWidth > innerWidth;
  tip.style.left = Math.max(4, event.clientX + (beside ? -14 - tip.offsetWidth : 14)) + "px";
  tip.style.top = Math.max(4, event.clientY - tip.offsetHeight - 12) + "px";
});
"""
LEFT, RIGHT, TOP = 62.0, 26.0, 34.0  # the margins of a plot, in pixels


@dataclass(frozen=True)
class Axis:
    """From values to pixels.

    ``low``, ``high``: the values at the ends.
    ``start``: the pixel of ``low``.
    ``length``: pixels from there to ``high``; negative where the axis goes up."""

    low: float
    high: float
    start: float
    length: float

    def __call__(self, value: float) -> float:
        return self.start + self.length * (value - self.low) / (self.high - self.low)

    def ticks(self, about: int, whole: bool = False) -> list[float]:
        """Return round values within the ends, about so many. ``whole``: whole numbers only."""
        rough = (self.high - self.low) / about
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * n for n in (1, 2, 2.5, 5, 10) if unit * n >= rough * (1 - 1e-9))
        step = max(1.0, step if step % 1 == 0 else math.ceil(step)) if whole else step
        first = math.ceil(self.low / step - 1e-9)
        return [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def is_dashed(i: int) -> bool:
    """Whether the lines of a run are dashed: each colour is of a plain line and a dashed one."""
    return i // COLOURS % 2 == 1


def curve_chart(
    metric: Metric, runs: Mapping[str, Curve], width: float = 548, height: float = 190
) -> Canvas | None:
    """Draw a number over steps. Return None if no run has this number.

    ``runs``: the curve of each run, by its name; the order of the runs gives the colours.
    ``width``: pixels of the picture.
    ``height``: pixels of the plot in it."""
    numbers = [x for curve in runs.values() for _, x in curve.points if x is not None]
    steps = [step for curve in runs.values() for step, _ in curve.points]
    if not numbers:
        return None
    canvas = Canvas(width, INK, PAPER)
    across = Axis(min(steps), max(max(steps), min(steps) + 1), LEFT, width - LEFT - RIGHT)
    up = Axis(*_ends(metric, numbers), TOP + height, -height)
    _axes(canvas, metric, across, up)
    for i, (name, curve) in enumerate(runs.items()):
        if curve.points:
            _curve(canvas, metric, name, i, curve, across, up)
    return canvas


def _ends(metric: Metric, numbers: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the upward axis: all numbers, with some room."""
    low, high = min(numbers), max(numbers)
    if metric.from_zero:
        low = min(low, 0.0)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (low if metric.from_zero else low - room), high + room


def _axes(canvas: Canvas, metric: Metric, across: Axis, up: Axis) -> None:
    left, right = across.start, across.start + across.length
    bottom, top = up.start, up.start + up.length
    canvas.text(0, 16, metric.title, size=14, bold=True)
    if metric.unit:
        canvas.text(right, 16, metric.unit, size=11, anchor="end", colour=FAINT)
    for value in up.ticks(5):
        y = up(value)
        canvas.line([(left, y), (right, y)], RULE)
        canvas.text(left - 8, y + 4, tick_text(value), size=11, anchor="end", colour=FAINT)
    canvas.line([(left, bottom), (right, bottom)], FAINT)
    for value in across.ticks(6, whole=True):
        x, text = across(value), f"{value:,.0f}"
        canvas.text(x, bottom + 17, text, size=11, anchor="middle", colour=FAINT)
    ends = {"left": left, "right": right, "top": top, "bottom": bottom}
    ends |= {"first": across.low, "last": across.high}
    with canvas.mark(metric.title, **{f"data_{name}": f"{x:g}" for name, x in ends.items()}):
        canvas.rect(left, top, right - left, bottom - top, fill="transparent", line="none")


def _curve(
    canvas: Canvas,
    metric: Metric,
    name: str,
    i: int,
    curve: Curve,
    across: Axis,
    up: Axis,
) -> None:
    shown, last = thin(curve.points), curve.points[-1]
    number = "not finite" if last[1] is None else f"{last[1]:.6g}"
    extra = {"data_smoothed": "yes"} if metric.smooth else {}
    with canvas.mark(
        f"{name}\n{metric.title}: {number} at step {last[0]:,}",
        data_kind="raw",
        data_run=name,
        data_steps=json.dumps([step for step, _ in shown], separators=(",", ":")),
        data_values=json.dumps(
            [None if x is None else float(f"{x:.6g}") for _, x in shown], separators=(",", ":")
        ),
        **extra,
    ):
        _lines(canvas, shown, i, across, up)
    if metric.smooth:
        with canvas.mark(f"{name}, smoothed", data_kind="smooth"):
            _lines(canvas, thin(smooth(curve.means)), i, across, up)


def _lines(canvas: Canvas, points: Sequence[Point], i: int, across: Axis, up: Axis) -> None:
    """Draw a line between gaps, and dots where not every step has a point."""
    few = len(points) <= 60 and len(points) <= points[-1][0] - points[0][0]
    for part in segments(points):
        places = [(across(step), up(x)) for step, x in part]
        if len(places) > 1:
            canvas.line(places, line_colour(i), dashed=is_dashed(i))
        for x, y in places if few or len(places) == 1 else ():
            dot = "M-2 0a2 2 0 1 0 4 0a2 2 0 1 0 -4 0"
            canvas.path(x, y, dot, line_colour(i), height=2)
