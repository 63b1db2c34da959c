"""The figure of docs/course/speed.md: the shipped trace, and two streams that overlap."""

from __future__ import annotations

from collections import Counter

from dtron.course.lab10_trace import CLASSES, Kernel, busy, exposed, kernels, kind, merged
from dtron.tools.svg import FAINT, PAPER, Canvas

FILLS = dict(
    zip(CLASSES, ("#4a8fd0", "#d0a050", "#8050c0", "#d05050", "#999", "#50b060"), strict=True)
)
LEFT, WIDTH = 20.0, 1080
STEP = 1.2  # pixels of a strip


def trace() -> str:
    """Draw the time of the shipped step by class; the step and one block of it in order of time;
    and what counts as busy and as exposed of two streams."""
    canvas, step = Canvas(WIDTH + 40), kernels()
    span = max(k.end for k in step) - min(k.start for k in step)
    canvas.text(LEFT, 28, f"One step of bench-1.3b, {span / 1e3:.1f} ms", bold=True, size=16)
    y, x = 44.0, LEFT
    idle = span - busy(step)
    times = {c: busy(k for k in step if kind(k.name) == c) for c in CLASSES} | {"idle": idle}
    shares = sorted(((us, c) for c, us in times.items() if us), reverse=True)
    for us, c in shares:
        width = WIDTH * us / span
        canvas.rect(x, y, width, 26, FILLS.get(c, PAPER), line=PAPER)
        if width > 8 * len(f"{c} 00.0 ms"):
            canvas.text(x + 6, y + 17, f"{c} {us / 1e3:.1f} ms")
        x += width
    small = ", ".join(f"{c} {us / 1e3:.1f}" for us, c in shares if WIDTH * us / span <= 120)
    canvas.text(LEFT, y + 44, f"narrow, in ms: {small}", colour=FAINT)
    canvas.text(LEFT, 118, "in order of time: the class that runs longest in each strip", bold=True)
    strip(canvas, 128, step, 0.0, span)
    canvas.text(
        LEFT,
        176,
        "a third of the step is forward, then backward, and last the update",
        colour=FAINT,
    )
    begin, end = block(step)
    canvas.text(LEFT, 206, f"a block forward, {(end - begin) / 1e3:.2f} ms", bold=True)
    strip(canvas, 216, step, begin, end)
    x = LEFT
    for c in CLASSES:
        canvas.rect(x, 262, 14, 14, FILLS[c], line=PAPER)
        canvas.text(x + 20, 274, c)
        x += 140
    streams(canvas, 316)
    return canvas.svg()


def strip(canvas: Canvas, y: float, step: list[Kernel], begin: float, end: float) -> None:
    """Draw strips of time. Strips of one class that follow one another are one shape."""
    first, count = min(k.start for k in step), int(WIDTH / STEP)
    longest = [Counter[str]() for _ in range(count)]
    for k in step:
        start, stop = ((t - first - begin) / (end - begin) * count for t in (k.start, k.end))
        for i in range(max(int(start), 0), min(int(stop) + 1, count)):
            longest[i][kind(k.name)] += min(stop, i + 1) - max(start, i)
    classes = [c.most_common(1)[0][0] if c else "" for c in longest]
    at = 0
    for i in range(1, count + 1):
        if i == count or classes[i] != classes[at]:
            if classes[at]:
                x = LEFT + at * STEP
                canvas.rect(x, y, (i - at) * STEP, 30, FILLS[classes[at]], line="none")
            at = i


def block(step: list[Kernel]) -> tuple[float, float]:
    """Return the time from one attention forward to the next, in the middle of the forward."""
    first = min(k.start for k in step)
    starts = [k.start - first for k in step if "fprop" in k.name]
    return starts[10], starts[11]


def streams(canvas: Canvas, y: float) -> None:
    """Draw two streams, and below the union of both and the exposed part."""
    spans = {
        "stream 1": [("matmul", 0, 30), ("elementwise", 30, 42), ("matmul", 66, 96)],
        "stream 2": [("communication", 12, 60), ("communication", 84, 108)],
    }
    names = {"matmul": "nvjet", "elementwise": "triton_poi", "communication": "nccl"}
    both = [
        Kernel(names[c], float(start), float(end))
        for row in spans.values()
        for c, start, end in row
    ]
    canvas.text(LEFT, y, "Two streams (made up)", bold=True, size=16)
    y += 16

    def box(start: float, end: float, top: float, fill: str) -> None:
        canvas.rect(LEFT + 160 + 8 * start, top, 8 * (end - start), 22, fill, line=PAPER)

    for name, row in spans.items():
        canvas.text(LEFT, y + 16, name)
        for c, start, end in row:
            box(start, end, y, FILLS[c])
            canvas.text(LEFT + 164 + 8 * start, y + 16, f"{c} {end - start}")
        y += 28
    compute = [k for k in both if kind(k.name) != "communication"]
    alone = merged((k.start, k.end) for k in both if k not in compute)
    canvas.text(LEFT, y + 16, f"busy: {busy(both):g} us")
    for start, end in merged((k.start, k.end) for k in both):
        box(start, end, y, "#bbb")
    y += 28
    canvas.text(LEFT, y + 16, f"exposed: {exposed(both):g} us")
    for start, end in alone:
        for a, b in outside(start, end, merged((k.start, k.end) for k in compute)):
            box(a, b, y, FILLS["communication"])
    total = sum(k.end - k.start for k in both)
    canvas.text(LEFT, y + 46, f"the sum of all durations is {total:g} us", colour=FAINT)


def outside(
    start: float, end: float, others: list[tuple[float, float]]
) -> list[tuple[float, float]]:
    """Return the parts of an interval that lie in no other one."""
    edges = sorted({start, end, *(t for span in others for t in span if start < t < end)})
    parts = list(zip(edges, edges[1:]))
    return [(a, b) for a, b in parts if not any(s <= a and b <= e for s, e in others)]
