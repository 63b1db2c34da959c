"""A plan as a page of HTML: the mesh, memory, the timeline of the step, and messages."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import torch

from dtron import __version__
from dtron.planner.gpu_rates import FOLDER, Gpu, rates_file
from dtron.planner.mesh_places import axes_in_use, group_of, ranks_text
from dtron.planner.report import (
    StepPlan,
    communication_table,
    memory_table,
    run_text,
    time_table,
)
from dtron.planner.step_time import link_of
from dtron.tools import html_page as html
from dtron.tools import plan_charts as charts
from dtron.tools.mesh_chart import axis_fills, mesh_chart

LINKS = {"nvlink": "NVLink, within a host", "network": "network, between hosts"}


def plan_page(plan: StepPlan, argv: Sequence[str], gpu_name: str, token_budget: float) -> str:
    """Return the page of a plan.

    ``argv``: the arguments of the command.
    ``gpu_name``: a name or a file of rates.
    ``token_budget``: tokens of a whole run; 0: no run is planned."""
    lead = [*source(["plan", *argv], gpu_name), html.cards(_cards(plan))]
    if token_budget:
        lead.append(html.paragraph(run_text(plan, token_budget)))
    sections = [_mesh(plan), _memory(plan), _time(plan), _messages(plan), rates(plan.gpu)]
    return html.page(f"Plan of a step on {plan.shape}", lead, sections)


def source(command: Sequence[str], gpu_name: str) -> list[str]:
    """Return elements with the command of a page, the versions, and the file of rates."""
    versions = f"dtron {__version__}, torch {torch.__version__}, rates of the GPU from"
    file = rates_file(gpu_name)
    shown = f"dtron/planner/gpu/{file.name}" if file.parent == FOLDER else str(file)
    return [
        html.paragraph("", shlex.join(["dtron", *command])),
        html.paragraph(versions, shown),
    ]


def rates(gpu: Gpu) -> str:
    """Return a section that says where the rates of a GPU come from."""
    text = f"Times follow from the rates of {gpu.name}. Each rate has its source here."
    return html.section(
        "Rates of the GPU", text, html.table(("rate", "source"), gpu.measured.items())
    )


def _cards(plan: StepPlan) -> list[tuple[str, str, str]]:
    room, most = plan.gpu.memory_gib, f"{plan.gib:,.1f} of {plan.gpu.memory_gib:g} GiB"
    over = f"does not fit: {plan.gib - room:,.1f} GiB too much"
    mfu = 100 * plan.tflops / plan.gpu.peak_tflops
    power = f"{plan.watts / plan.shape.size:,.0f} W"
    clock = f"of each GPU, at {min(t.ghz for t in plan.times):.2f} GHz"
    cards = [(power, clock, "")] if plan.watts else []
    return [
        (most, "fits" if plan.fits else over, "good" if plan.fits else "bad"),
        (f"{1e3 * plan.seconds:,.1f} ms", f"a step of {plan.tokens:,} tokens", ""),
        (f"{plan.tokens_per_second:,.0f} tokens/s", f"on each of {plan.shape.size:,} GPUs", ""),
        (f"{plan.tflops:,.0f} TFLOP/s", f"MFU {mfu:.1f} %", ""),
        *cards,
    ]


def _mesh(plan: StepPlan) -> str:
    shape, fills = plan.shape, axis_fills(plan.shape)
    rows = []
    for axis in axes_in_use(shape):
        ranks, link = group_of(shape, axis, 0), link_of(shape, axis, plan.gpu)
        rows.append((axis, str(len(ranks)), LINKS[link], ranks_text(ranks)))
    text = f"{shape.size:,} GPUs, {plan.gpu.gpus_of_a_host} on a host. A square marks the ranks "
    text += "that rank 0 exchanges messages with on an axis."
    parts = [html.drawing(mesh_chart(shape, plan.gpu.gpus_of_a_host), f"mesh {shape}")]
    if rows:
        headers = ("axis", "ranks", "link", "group of rank 0")
        parts = [html.legend(fills.items()), *parts, html.table(headers, rows, (1,))]
    else:
        text = "One GPU."
    return html.section("Mesh", text, *parts)


def _memory(plan: StepPlan) -> str:
    rows = charts.memory_of(plan)
    used = [(kind, fill) for kind, fill in charts.MEMORY.items() if any(row[kind] for row in rows)]
    text = (
        "What the memory of each pipeline rank holds at the largest total of a step. A triangle is "
    )
    text += "the largest total while weights and state are made."
    picture = html.drawing(charts.memory_chart(plan), "memory of each pipeline rank")
    table = html.same_table(memory_table(plan))
    return html.section("Memory", text, html.legend(used), picture, table)


def _time(plan: StepPlan) -> str:
    text = "Numbers are microbatches. The lanes below a rank are the messages of each axis: "
    text += "the higher, the more of this time they are under way."
    legend = html.legend(charts.work_legend(plan))
    picture = html.drawing(charts.timeline(plan), "timeline of each pipeline rank")
    return html.section("Timeline", text, legend, picture, html.same_table(time_table(plan)))


def _messages(plan: StepPlan) -> str:
    chart = charts.message_chart(plan)
    if chart is None:
        return html.section("Messages", "This mesh sends nothing.")
    legend = html.legend([("hidden behind kernels", charts.HIDDEN), ("exposed", charts.EXPOSED)])
    text = "The bytes and the time of the pipeline rank that sends most on an axis. A message to "
    text += "another stage is hidden here; the timeline shows where that stage waits for it."
    if any("." in axis for t in plan.times for axis in t.sent):
        text += " An axis such as dp.ep is the part of dp that is a part of ep, too."
    picture = html.drawing(chart, "bytes and time of the messages of each axis")
    table = html.same_table(communication_table(plan))
    return html.section("Messages", text, legend, picture, table)
