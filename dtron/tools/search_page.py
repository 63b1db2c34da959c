"""A search for a mesh as a page of HTML: the choices that fit by memory and speed, and the meshes
that cannot be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dtron.planner.gpu_rates import Gpu
from dtron.tools import html_page as html
from dtron.tools.charts import Scale, axis_below, tick_text
from dtron.tools.html_page import FAINT, INK, PAPER, RULE, series
from dtron.tools.plan_page import rates, source
from dtron.tools.plan_search import Choice, Search, frontier
from dtron.tools.svg import Canvas

WIDTH, HEIGHT = 1100, 460
# The shape and the colour of a point, by the policy of activations.
SHAPES = {
    "none": ("circle", "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0Z", series(0)),
    "selective": ("square", "M-4.5 -4.5h9v9h-9Z", series(1)),
    "full": ("triangle", "M0 -5.5L5.5 4.5H-5.5Z", series(2)),
}


def search_page(
    search: Search,
    choices: Sequence[Choice],
    argv: Sequence[str],
    command: str,
    gpu_name: str,
) -> str:
    """Return the page of a search.

    ``choices``: the choices that fit, the fastest first.
    ``argv``: the arguments of the search.
    ``command``: the command of a plan, without the flags of a choice.
    ``gpu_name``: a name or a file of rates."""
    best, gpu = frontier(choices), search.gpu
    cards = html.cards(_cards(choices, search.too_large))
    lead = [*source(["plan", "search", *argv], gpu_name), cards]
    parts = [_points(choices, best, gpu, command), _front(best, command)]
    title = f"Search for a mesh of {search.gpus:,} GPUs"
    return html.page(title, lead, [*parts, _meshes(search.refused), rates(gpu)])


def _cards(choices: Sequence[Choice], too_large: int) -> list[tuple[str, str, str]]:
    cards = [(f"{len(choices):,}", "choices fit", "good" if choices else "bad")]
    cards.append((f"{too_large:,}", "need more memory", ""))
    if choices:
        best = choices[0]
        fastest = f"on each GPU, the fastest: {best.shape}"
        cards.insert(0, (f"{best.tokens_per_second:,.0f} tokens/s", fastest, ""))
    return cards


def scatter(choices: Sequence[Choice], best: Sequence[Choice], gpu: Gpu, command: str) -> Canvas:
    """Draw each choice as a point: its memory to the right, its speed upwards. A line joins the
    choices that no other one beats in both.

    ``command``: the command of a plan, without the flags of a choice."""
    canvas = Canvas(WIDTH, INK, PAPER)
    bottom = HEIGHT - 44
    across = Scale(1.02 * gpu.memory_gib, 70, WIDTH - 100)
    up = Scale(1.08 * max(x.tokens_per_second for x in choices), bottom, 24 - bottom)
    axis_below(canvas, across, 24, bottom, "GiB of memory on the rank with the most")
    for value in up.ticks():
        canvas.line([(across(0), up(value)), (across(across.most), up(value))], RULE)
        canvas.text(62, up(value) + 4, tick_text(value), size=11, anchor="end", colour=FAINT)
    canvas.text(8, 14, "tokens/s on each GPU", size=11, colour=FAINT)
    canvas.line([(across(gpu.memory_gib), 24), (across(gpu.memory_gib), bottom)], INK)
    text = f"memory of the GPU: {gpu.memory_gib:g} GiB"
    canvas.text(across(gpu.memory_gib), 14, text, size=11, anchor="end", bold=True)
    front = [(across(x.gib), up(x.tokens_per_second)) for x in best]
    canvas.line(front, INK)
    chosen = set(map(id, best))
    for x in sorted(choices, key=lambda x: id(x) in chosen):
        on_front = id(x) in chosen
        at = across(x.gib), up(x.tokens_per_second)
        _point(canvas, at, x, on_front, f"{command} {x.flags}")
    return canvas


def _point(
    canvas: Canvas, at: tuple[float, float], x: Choice, on_front: bool, command: str
) -> None:
    _, d, fill = SHAPES[x.config.recompute]
    focus = {"tabindex": 0, "data_front": 1} if on_front else {}
    with canvas.mark(f"{describe(x)}\n{command}", **focus):
        canvas.path(*at, d, fill, INK if on_front else PAPER)


def describe(x: Choice) -> str:
    """Return the mesh and the settings of a choice, and what they cost."""
    c, pipe = x.config, x.config.pipeline
    schedule = f", {pipe.schedule}" if x.shape.pp > 1 else ""
    return (
        f"{x.shape}: ZeRO {c.zero}{schedule}, {x.microbatches} microbatches of {c.micro_batch}, "
        f"recompute {c.recompute}\n{x.gib:,.1f} GiB, {1e3 * x.seconds:,.1f} ms a step, "
        f"{x.tokens_per_second:,.0f} tokens/s, MFU {100 * x.mfu:.1f} %"
    )


def _points(choices: Sequence[Choice], best: Sequence[Choice], gpu: Gpu, command: str) -> str:
    text = "Each point is a way to train. The line joins the choices that no other choice beats in "
    text += "both memory and speed. A point shows its mesh, its settings and its command."
    if not choices:
        return html.section("Choices", "No choice is possible and fits into the memory of a GPU.")
    used = {x.config.recompute for x in choices}
    entries = [(f"recompute {k} ({v[0]})", v[2]) for k, v in SHAPES.items() if k in used]
    picture = html.drawing(scatter(choices, best, gpu, command), "speed and memory of each choice")
    return html.section("Choices", text, html.legend(entries), picture)


def _front(best: Sequence[Choice], command: str) -> str:
    if not best:
        return ""
    rows = []
    for x in best:
        numbers = (f"{x.gib:,.1f}", f"{1e3 * x.seconds:,.1f}", f"{x.tokens_per_second:,.0f}")
        rows.append((str(x.shape), *numbers, f"{100 * x.mfu:.1f} %", f"{command} {x.flags}"))
    headers = ("mesh", "GiB", "ms a step", "tokens/s", "MFU", "command")
    text = "The choices on the line, the fastest first. Plan each of them whole before training."
    return html.section(
        "The best choices", text, html.table(headers, rows, (1, 2, 3, 4), code=(5,))
    )


def _meshes(refused: Mapping[str, str]) -> str:
    if not refused:
        return html.section("Meshes that cannot be", "Every mesh of these GPUs is possible.")
    text = f"{len(refused):,} meshes are not possible for this model or this batch."
    return html.section(
        "Meshes that cannot be", text, html.table(("mesh", "reason"), refused.items())
    )
