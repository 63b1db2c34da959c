"""Pictures of ZeRO: the memory of a rank, and the order of the collectives of a real step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dtron.course.views.layer import COLOURS
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import simulated
from dtron.mesh import Layout
from dtron.model.batch import Batch, make_batch
from dtron.model.config import ModelConfig
from dtron.model.transformer import Transformer
from dtron.params import init
from dtron.rules import rules_for
from dtron.schedules.runner import StageOutput
from dtron.tools.count_collectives import Collective, CollectiveCounter
from dtron.tools.drawing import FAINT, Canvas
from dtron.tools.show import rows, size, total
from dtron.training.gradients import gradients
from dtron.training.pipeline import one_stage, program

KINDS = (("weights", "#4a8fd0"), ("gradients", "#50b060"), ("optimizer", "#d0a050"))
STAGES = (0, 1, 2, 3)


def zero_step(
    zero: int, shape: MeshShape, microbatches: int, blocks: int = 2
) -> list[Collective | str]:
    """Return the collectives of one real step over dp in order, with marks where the forward and
    the backward of a microbatch begin."""
    m = ModelConfig(
        vocab=32, embed=16, layers=blocks, heads=2, kv_heads=2, head_dim=8, mlp=32, vocab_multiple=1
    )
    order: list[Collective | str] = []
    with simulated(shape) as mesh, CollectiveCounter(mesh) as counter:
        counter.order = order  # with marks among them
        layout = Layout(mesh, rules_for(zero))
        pipe, functions = one_stage(m, microbatches, layout), program(m, layout)
        params = init(pipe.spec, m.dims(), 0, layout)
        batch = make_batch(torch.zeros(shape.data, 9, dtype=torch.long), layout)

        def enter(weights: Transformer, batch: Batch) -> Tensor:
            order.append("forward")
            return functions.enter(weights, batch)

        def stage(
            weights: Transformer, x: Tensor, batch: Batch
        ) -> tuple[Tensor, StageOutput | None]:
            loss, extra = functions.stage(weights, x, batch)
            order.append("backward")
            return loss, extra

        marked = replace(functions, enter=enter, stage=stage)
        gradients(marked, params, [batch] * microbatches, 16 * microbatches, pipe, zero)
    return order


def zero(
    shape: MeshShape,
    steps_on: MeshShape,
    microbatches: int = 2,
    stages: Sequence[int] = STAGES,
) -> str:
    """Draw the memory of a rank in each ZeRO stage, and below the order of its collectives.

    ``shape``: the mesh of the memory.
    ``steps_on``: the mesh of the steps, which are simulated.
    ``stages``: the stages whose steps are drawn."""
    canvas = Canvas(1180)
    _draw_memory(canvas, shape)
    many = f"{microbatches} microbatches" if microbatches != 2 else "two microbatches"
    title = f"One step of {many} on {steps_on} (2 blocks), as it was recorded"
    canvas.text(20, 228, title, bold=True, size=16)
    for i, stage in enumerate(stages):
        y, x = 250 + i * 46, 90.0
        canvas.text(20, y + 16, f"zero {stage}")
        for event in zero_step(stage, steps_on, microbatches):
            if isinstance(event, str):
                canvas.rect(x + 2, y - 2, 18, 26, "#eee")
                canvas.text(x + 11, y + 15, event[0].upper(), anchor="middle", bold=True)
                x += 22
            else:
                canvas.rect(x, y, 9, 22, COLOURS[event.kind])
                x += 10
    y = 250 + len(stages) * 46
    legend(canvas, 90, y, [(k.replace("_", "-"), c) for k, c in COLOURS.items()])
    canvas.text(500, y + 12, "F, B: a microbatch's forward and backward begin", colour=FAINT)
    return canvas.svg()


def _draw_memory(canvas: Canvas, shape: MeshShape) -> None:
    model = ModelConfig()
    canvas.text(
        20, 28, f"What one rank of {shape} keeps, bf16 compute (model tiny)", bold=True, size=16
    )
    most = sum(total(rows(model, shape, 0)))
    for stage in STAGES:
        y, x = 44 + stage * 30, 90.0
        canvas.text(20, y + 16, f"zero {stage}")
        for (_, fill), n in zip(KINDS, total(rows(model, shape, stage)), strict=True):
            canvas.rect(x, y, 800 * n / most, 22, fill)
            if 800 * n / most > 56:
                canvas.text(x + 6, y + 15, size(n))
            x += 800 * n / most
        canvas.text(x + 14, y + 15, size(sum(total(rows(model, shape, stage)))), bold=True)
    legend(canvas, 90, 180, KINDS)


def legend(canvas: Canvas, x: float, y: float, entries: Iterable[tuple[str, str]]) -> None:
    """Draw pairs of a name and its colour, side by side."""
    for name, fill in entries:
        canvas.rect(x, y, 14, 14, fill)
        canvas.text(x + 20, y + 12, name)
        x += 130


def stage_on(zero_stage: int, dp: int, microbatches: int) -> str:
    """Draw the memory of all stages on dp ranks, and a step of one stage on two ranks."""
    return zero(MeshShape(dp=dp), MeshShape(dp=2), microbatches, (zero_stage,))
