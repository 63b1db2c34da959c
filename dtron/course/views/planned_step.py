"""A picture of a plan: the milliseconds and the memory of a step on GPUs that nobody needs to
have."""

from __future__ import annotations

from dtron.planner.report import GIB, StepPlan
from dtron.runtime.cli import parse
from dtron.tools.charts import Scale
from dtron.tools.drawing import FAINT, Canvas
from dtron.tools.plan import PlanConfig, plan_config, quiet

TASK = "--model bench-1.3b --model.layers 4 --batch 16 --data.seq-len 2048"
BUSY, EXPOSED, KEPT = "#4a8fd0", "#d05050", "#50b060"


def plan_of(mesh: str, zero: int, micro_batch: int) -> StepPlan:
    """Plan a step of four blocks on H100s. Raises UserError if the mesh does not fit the model."""
    quiet()
    flags = f"{TASK} --mesh {mesh} --zero {zero} --micro-batch {micro_batch}"
    return plan_config(parse(flags.split(), PlanConfig()), "h100")


def planned_step(mesh: str = "dp=8", zero: int = 3, micro_batch: int = 1) -> str:
    """Draw where the milliseconds of a step go, and what the memory of a GPU holds."""
    plan, canvas = plan_of(mesh, zero, micro_batch), Canvas(900)
    time, rank = plan.times[0], plan.ranks[0]
    rows = [(kind, 1e3 * s, BUSY) for kind, s in time.busy.items()]
    rows += [(f"waits for {axis}", 1e3 * s, EXPOSED) for axis, s in time.exposed.items()]
    title = f"{1e3 * plan.seconds:.1f} ms, {plan.tokens_per_second:,.0f} tokens/s on each GPU"
    y = _bars(canvas, 24, title, rows, "ms")
    kept = [(kind, n / GIB, KEPT) for kind, n in rank.peak.items() if n]
    _bars(canvas, y + 30, f"{plan.gib:.2f} GiB on the GPU with the most", kept, "GiB")
    canvas.text(20, canvas.height + 20, f"dtron plan {TASK} --gpu h100", colour=FAINT)
    return canvas.svg()


def _bars(
    canvas: Canvas, y: float, title: str, rows: list[tuple[str, float, str]], unit: str
) -> float:
    canvas.text(20, y, title, bold=True, size=14)
    scale = Scale(max(value for _, value, _ in rows), 180, 600)
    for i, (name, value, fill) in enumerate(rows):
        top = y + 14 + 24 * i
        canvas.text(20, top + 14, name)
        canvas.rect(180, top, max(scale.size(value), 1), 18, fill)
        canvas.text(scale(value) + 8, top + 14, f"{value:.2f} {unit}", colour=FAINT)
    return y + 14 + 24 * len(rows)
