"""Draws a plan: the memory of each pipeline rank, the timeline of a step, and the messages."""

from __future__ import annotations

from collections.abc import Iterator

from dtron.planner.plan_step import SECOND, STATE
from dtron.planner.report import GIB, STEP, StepPlan
from dtron.planner.step_time import Message, RankTime, Span, link_of
from dtron.tools.charts import Scale, axis_below, lane, shares
from dtron.tools.html_page import FAINT, IDLE, INK, PAPER, series
from dtron.tools.svg import Canvas

WIDTH = 1100
LIBRARIES = "libraries"
MEMORY = {kind: series(i) for i, kind in enumerate((*STATE, *STEP, LIBRARIES, SECOND))}
WORK = {
    "forward": series(0),
    "backward": series(2),
    "input gradient": series(5),
    "weight gradient": series(1),
    "reduce": series(3),
    "update": series(4),
}
EXPOSED, HIDDEN = series(6), series(8)
BINS = 900  # of time, across a timeline
CROWDED = 16  # pipeline ranks from which a timeline has thin rows


def memory_of(plan: StepPlan) -> list[dict[str, float]]:
    """Return the bytes of each pipeline rank at its peak, by kind."""
    libraries = {LIBRARIES: plan.gpu.overhead_gib * GIB}
    kinds = (*STATE, SECOND, *STEP)
    return [{kind: r.peak.get(kind, 0) for kind in kinds} | libraries for r in plan.ranks]


def memory_chart(plan: StepPlan, width: float = WIDTH) -> Canvas:
    """Draw the memory of each pipeline rank at its peak as a stacked bar, against the memory of the
    GPU. A triangle below a bar is the memory at start."""
    canvas, rows, room = Canvas(width, INK, PAPER), memory_of(plan), plan.gpu.memory_gib
    ends = [(r.at_start / GIB + plan.gpu.overhead_gib) for r in plan.ranks]
    most = max(*(sum(row.values()) / GIB for row in rows), *ends, 0.01)
    small = most < room / 4
    scale = Scale(1.1 * (most if small else max(most, room)), 70, width - 130)
    bottom = 22 + 30 * len(rows)
    axis_below(canvas, scale, 18, bottom, "GiB")
    for i, (row, r, at_start) in enumerate(zip(rows, plan.ranks, ends, strict=True)):
        y, x = 26 + 30 * i, scale(0)
        canvas.text(62, y + 15, f"rank {r.rank}", anchor="end")
        for kind, n in row.items():
            wide = scale.size(n / GIB)
            if not n:
                continue
            title = f"rank {r.rank}: {kind} {n / GIB:,.3f} GiB"
            with canvas.mark(title, data_rank=r.rank, data_kind=kind):
                canvas.rect(x, y, wide, 22, MEMORY[kind], line=PAPER)
                if wide > 7 * len(kind) + 8:
                    canvas.text(x + wide / 2, y + 15, kind, size=11, anchor="middle")
            x += wide
        total = sum(row.values()) / GIB
        with canvas.mark(f"rank {r.rank}: {at_start:,.2f} GiB at start"):
            canvas.path(scale(at_start), y + 22, "M0 0l4 7h-8Z", INK)
        canvas.text(x + 6, y + 15, f"{total:,.2f}", bold=True)
    if small:
        text = f"the GPU has {room:g} GiB, far to the right"
        canvas.text(scale(scale.most), 12, text, size=11, anchor="end", colour=FAINT)
    else:
        canvas.line([(scale(room), 16), (scale(room), bottom)], INK)
        text = f"memory of the GPU: {room:g} GiB"
        canvas.text(scale(room), 12, text, size=11, anchor="end", bold=True)
    return canvas


def lanes_of(plan: StepPlan) -> list[str]:
    """Return the axes whose messages a timeline has, from the innermost axis of the mesh to the
    outermost, and then all others."""
    found = {m.axis for t in plan.times for m in t.messages}
    own = [axis for axis in reversed(plan.shape.atoms) if axis in found]
    return own + sorted(found - set(own))


def timeline(plan: StepPlan, width: float = WIDTH) -> Canvas:
    """Draw the step of each pipeline rank: its actions with their microbatches, and a lane for the
    messages of each axis below."""
    canvas, axes = Canvas(width, INK, PAPER), lanes_of(plan)
    height = 12 if len(plan.times) > CROWDED else 24
    each = height + 12 * len(axes) + 12
    scale = Scale(1e3 * plan.seconds, 110, width - 130)
    bottom = 8 + each * len(plan.times)
    axis_below(canvas, scale, 4, bottom, "milliseconds")
    for i, (r, t) in enumerate(zip(plan.ranks, plan.times, strict=True)):
        y = 8 + each * i
        canvas.text(62, y + height / 2 + 4, f"rank {r.rank}", anchor="end", bold=True)
        _work(canvas, scale, y, height, t)
        for j, axis in enumerate(axes):
            top = y + height + 2 + 12 * j
            canvas.text(102, top + 9, axis, size=10, anchor="end", colour=FAINT)
            _messages(canvas, scale, top, r.rank, [m for m in t.messages if m.axis == axis])
    return canvas


def _work(canvas: Canvas, scale: Scale, y: float, height: float, t: RankTime) -> None:
    for span in t.spans:
        stage, _, microbatch = span.name.partition(".")
        what = f" of microbatch {microbatch} in stage {stage}" if span.name else ""
        label = microbatch or span.kind
        _span(canvas, scale, (y, height), span, WORK[span.kind], what, label)
    for span in t.waits:
        _span(canvas, scale, (y, height), span, IDLE, f" ({span.name})", "")


def _span(
    canvas: Canvas,
    scale: Scale,
    place: tuple[float, float],
    span: Span,
    fill: str,
    what: str,
    label: str,
) -> None:
    """Draw a span of time.

    ``place``: its upper end and its height.
    ``what``: follows its kind in the title.
    ``label``: is written where there is room."""
    (y, height), start, end = place, 1e3 * span.start, 1e3 * span.end
    x, wide = scale(start), scale.size(end - start)
    if wide <= 0:
        return
    with canvas.mark(f"{span.kind}{what}\n{start:,.2f} to {end:,.2f} ms: {end - start:,.2f} ms"):
        canvas.rect(x, y, wide, height, fill, line=PAPER if wide > 3 else "none")
        if height > 20 and wide > 6.5 * len(label) + 3:
            canvas.text(x + wide / 2, y + 16, label, size=10, anchor="middle")


def _messages(canvas: Canvas, scale: Scale, top: float, rank: int, messages: list[Message]) -> None:
    """Draw the time in which messages are under way, and in front the part that is exposed."""
    if not messages:
        return
    most = scale.most / 1e3
    running = shares(((m.start, min(m.end, most)) for m in messages), most, BINS)
    waiting = [(m.end - m.exposed, m.end) for m in messages]
    exposed = shares(waiting, most, BINS)
    shown = sum(m.exposed for m in messages)
    title = f"rank {rank}, {messages[0].axis}: {len(messages):,} messages, "
    title += f"{_size(sum(m.nbytes for m in messages))}, exposed {1e3 * shown:,.1f} ms"
    with canvas.mark(title):
        canvas.rect(scale(0), top, scale.length, 10, IDLE, line="none")
        both = [10 * max(a, b) for a, b in zip(running, exposed, strict=True)]
        lane(canvas, scale, top, both, HIDDEN)
        lane(canvas, scale, top, [10 * x for x in exposed], EXPOSED)


def work_legend(plan: StepPlan) -> Iterator[tuple[str, str]]:
    """Yield the names and fills of a timeline, without those that it lacks."""
    kinds = {span.kind for t in plan.times for span in t.spans if span.end > span.start}
    yield from ((kind, fill) for kind, fill in WORK.items() if kind in kinds)
    if any(t.waits for t in plan.times):
        yield "waits for other stages", IDLE
    if lanes_of(plan):
        yield "message, hidden behind kernels", HIDDEN
        yield "message, exposed", EXPOSED


def message_chart(plan: StepPlan, width: float = WIDTH) -> Canvas | None:
    """Draw for each axis what the rank that sends most sends, and how long its messages take. None:
    nothing is sent."""
    canvas, half = Canvas(width, INK, PAPER), (width - 150) / 2
    rows = _most_sent(plan)
    if not rows:
        return None
    left = Scale(max(sent for _, sent, _, _ in rows), 140, half - 90)
    right = Scale(
        max(1e-9, *(hidden + exposed for *_, hidden, exposed in rows)), 150 + half, half - 110
    )
    canvas.text(140, 12, "bytes that a rank sends in a step", colour=FAINT, size=11)
    canvas.text(150 + half, 12, "milliseconds under way in a step", colour=FAINT, size=11)
    for i, (axis, sent, hidden, exposed) in enumerate(rows):
        y, x, link = 22 + 32 * i, right(0), link_of(plan.shape, axis, plan.gpu)
        canvas.text(132, y + 10, axis, anchor="end", bold=True)
        canvas.text(132, y + 22, link, anchor="end", size=10, colour=FAINT)
        with canvas.mark(f"{axis}: {_size(sent)} over {link}", data_axis=axis):
            canvas.rect(left(0), y, left.size(sent), 22, series(0), line="none")
        canvas.text(left(sent) + 6, y + 15, _size(sent))
        for kind, seconds, fill in (("hidden", hidden, HIDDEN), ("exposed", exposed, EXPOSED)):
            with canvas.mark(f"{axis}: {kind} {1e3 * seconds:,.2f} ms"):
                canvas.rect(x, y, right.size(seconds), 22, fill, line="none")
            x += right.size(seconds)
        canvas.text(x + 6, y + 15, f"{1e3 * (hidden + exposed):,.1f} ms")
    return canvas


def _most_sent(plan: StepPlan) -> list[tuple[str, float, float, float]]:
    """Return for each axis the bytes, the hidden and the exposed seconds of the rank that sends
    most on it."""
    rows = []
    for axis in dict.fromkeys(axis for t in plan.times for axis in t.sent):
        sent_by_rank = [t.sent[axis] for t in plan.times]
        t = plan.times[sent_by_rank.index(max(sent_by_rank))]
        messages = [m for m in t.messages if m.axis == axis]
        exposed = sum(m.exposed for m in messages)
        took = sum(m.end - m.start for m in messages)
        rows.append((axis, t.sent[axis], max(0.0, took - exposed), exposed))
    return rows


def _size(n: float) -> str:
    return f"{n / 1e9:,.2f} GB" if n >= 1e9 else f"{n / 1e6:,.2f} MB"
