"""The figures of docs/planning.md: the memory and the timeline of a plan, as a page has them."""

from __future__ import annotations

from dataclasses import replace

from dtron.model.presets import preset
from dtron.planner.report import StepPlan
from dtron.runtime.config import DataConfig, PipelineConfig, RunConfig
from dtron.tools import plan_charts as charts
from dtron.tools.html_page import PAPER, THEME
from dtron.tools.plan import plan_config, quiet
from dtron.tools.svg import Canvas

FILES = ("plan-memory.svg", "plan-timeline.svg")


def example() -> StepPlan:
    """Return the plan that the figures show."""
    quiet()
    config = RunConfig(
        model=replace(preset("bench-1.3b"), layers=8, context=4096),
        mesh="pp=4,tp=2",
        batch=8,
        micro_batch=1,
        data=DataConfig(seq_len=4096),
        pipeline=PipelineConfig("zb-v"),
    )
    return plan_config(config)


def plans(plan: StepPlan) -> dict[str, str]:
    """Return the figures of a plan, by file name."""
    rows = charts.memory_of(plan)
    kinds = [(kind, fill) for kind, fill in charts.MEMORY.items() if any(x[kind] for x in rows)]
    memory = _with_legend(charts.memory_chart(plan), kinds)
    timeline = _with_legend(charts.timeline(plan), [*charts.work_legend(plan)])
    return dict(zip(FILES, (memory, timeline), strict=True))


def _with_legend(canvas: Canvas, entries: list[tuple[str, str]]) -> str:
    x, y = 70.0, canvas.height + 22
    for name, fill in entries:
        if x + 24 + 7 * len(name) > charts.WIDTH:
            x, y = 70.0, y + 22
        canvas.rect(x, y, 14, 14, fill, line=PAPER)
        canvas.text(x + 20, y + 12, name)
        x += 44 + 7 * len(name)
    return canvas.svg(THEME)
