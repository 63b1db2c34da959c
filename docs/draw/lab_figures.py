"""Figures of the labs on experts, numbers, and a layer of one's own; see figures.py."""

from __future__ import annotations

from math import log2

import torch
from torch import Tensor

from dtron.course.lab11_layers import Weights, layer, masked
from dtron.course.lab11_own_layer import DIMS, INPUTS, OUT, first_tokens
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full
from dtron.distributed.simulated_ranks import simulated
from dtron.mesh import Layout
from dtron.moe.permutation import by_expert
from dtron.params import declare, unshard
from dtron.testing import LayerCase
from dtron.tools.svg import FAINT, PAPER, Canvas
from dtron.tree import tree_map

FILLS, EMPTY = ("#8fb8e8", "#9fd8a8", "#e8c88f", "#d8a0c8"), "#f2f2f2"


def slots_and_rows(tokens: int = 6, k: int = 2, experts: int = 4, ranks: int = 2) -> str:
    """Draw the slots of tokens, their rows in the order of experts, and the slots again. The order
    is that of dtron's permutation."""
    generator = torch.Generator().manual_seed(3)
    index_TK = torch.randn(tokens, experts, generator=generator).topk(k).indices
    permutation, _ = by_expert(index_TK.flatten(), experts)
    expert_S, slot_R = index_TK.flatten().tolist(), permutation.slot_R.tolist()
    canvas, cell = Canvas(900), 56
    left, tops = 150, (70, 170, 270)

    def middle(i: int) -> float:
        return left + i * cell + cell / 2

    title = f"{tokens} tokens at {k} of {experts} experts, which {ranks} ranks of ep hold"
    canvas.text(20, 28, title, bold=True, size=16)
    for name, top in zip(("slots", "rows, by expert", "slots again"), tops, strict=True):
        canvas.text(20, top + 20, name, bold=True)
    for row, slot in enumerate(slot_R):
        for upper in (0, 1):
            ends = (middle(slot), middle(row)) if upper == 0 else (middle(row), middle(slot))
            points = [(ends[0], tops[upper] + 32), (ends[1], tops[upper + 1])]
            canvas.line(points, FILLS[expert_S[slot]])
    for top, order in zip(tops, (range(len(expert_S)), slot_R, range(len(expert_S))), strict=True):
        for i, slot in enumerate(order):
            x = left + i * cell
            canvas.rect(x + 2, top, cell - 4, 32, FILLS[expert_S[slot]])
            canvas.text(x + cell / 2, top + 20, f"t{slot // k} e{expert_S[slot]}", anchor="middle")
    each = experts // ranks
    at = 0
    for rank in range(ranks):
        count = sum(expert_S.count(e) for e in range(rank * each, (rank + 1) * each))
        x = left + at * cell
        canvas.line([(x + 2, tops[1] + 40), (x + count * cell - 2, tops[1] + 40)], "#222")
        of = f"rank {rank}: {count} rows"
        canvas.rect(x + count * cell / 2 - 46, tops[1] + 43, 92, 18, PAPER, line="none")
        canvas.text(x + count * cell / 2, tops[1] + 56, of, anchor="middle", colour=FAINT)
        at += count
    note = "the output of a token is the sum of its slots, times their weights"
    canvas.text(left, tops[2] + 52, note, colour=FAINT)
    return canvas.svg()


def casts() -> str:
    """Draw the error of a cast to e4m3, and its bound, over numbers of many sizes."""
    x = torch.tensor([2.0**p * (1 + (i + 0.5) / 48) for p in range(-12, 9) for i in range(48)])
    x = x[x <= 448]
    error = (x.to(torch.float8_e4m3fn).float() - x).abs()
    bound = torch.maximum(x * 2.0**-4, torch.full_like(x, 2.0**-10))
    canvas = Canvas(900)
    canvas.text(20, 28, "The error of a cast to e4m3, and its bound", bold=True, size=16)
    left, top, width, height = 70.0, 50.0, 800.0, 280.0
    low, high = -18.0, 5.0

    def place(number: float, size: float) -> tuple[float, float]:
        across = (log2(number) + 12) / 21
        up = (max(log2(size), low) - low) / (high - low) if size else 0.0
        return left + width * across, top + height * (1 - up)

    for power in range(-18, 6, 4):
        y = place(1, 2.0**power)[1]
        canvas.line([(left, y), (left + width, y)], "#eee")
        canvas.text(left - 8, y + 4, f"2^{power}", anchor="end", colour=FAINT)
    for power in range(-12, 10, 3):
        px = place(2.0**power, 1)[0]
        canvas.text(px, top + height + 18, f"2^{power}", anchor="middle", colour=FAINT)
    pairs = list(zip(x.tolist(), error.tolist(), strict=True))
    canvas.line([place(a, e) for a, e in pairs], "#4a8fd0")
    canvas.line([place(a, b) for a, b in zip(x.tolist(), bound.tolist(), strict=True)], "#d05050")
    canvas.text(left + 6, top + 168, "subnormal numbers: the bound is 2^-10", colour=FAINT)
    canvas.text(left + 480, top + 20, "normal numbers: the bound is 2^-4 x", colour=FAINT)
    y = top + height + 44
    for i, (name, fill) in enumerate((("error of a cast", "#4a8fd0"), ("bound", "#d05050"))):
        canvas.rect(left + 160 * i, y, 14, 14, fill, line=PAPER)
        canvas.text(left + 20 + 160 * i, y + 12, name)
    canvas.text(left + 330, y + 12, "x from left to right, |cast(x) - x| upwards", colour=FAINT)
    return canvas.svg()


def seen(mesh: str, first_T: Tensor) -> Tensor:
    """Return whether the output of a token depends on another one: ``[T, T]``, from the gradients
    of the layer of lab 11 on a mesh."""
    case = LayerCase(layer(masked), Weights, DIMS, INPUTS, OUT)
    spec, rows = declare(Weights, DIMS), []
    with simulated(MeshShape.parse(mesh)) as device_mesh:
        layout = Layout(device_mesh)
        placed = tree_map(lambda w, s: layout.shard(w, *s.axes), case.weights(spec), spec)
        x_TD = layout.shard(case.values()["x"], *INPUTS["x"]).requires_grad_()
        y_TD = case.fn(unshard(placed, layout), x_TD, layout.shard(first_T, "tokens"), layout)
        for one in torch.eye(len(first_T), dtype=y_TD.dtype):
            direction = layout.shard(one[:, None].expand(y_TD.shape).contiguous(), *OUT)
            (g,) = torch.autograd.grad(y_TD, x_TD, direction, retain_graph=True)
            rows.append(full(g).abs().sum(1) > 0)
    return torch.stack(rows)


def own_layer(ranks: int, documents: tuple[int, ...], cell: int = 15) -> str:
    """Draw the tokens that each output depends on, on ranks of cp."""
    mesh = f"cp={ranks}"
    first_T = first_tokens(mesh, documents)(None)
    tokens = len(first_T)
    each, left, top = tokens // ranks, 150.0, 60.0
    canvas = Canvas(900)
    canvas.text(20, 28, f"Which tokens an output depends on, {mesh}", bold=True, size=16)
    for rank in range(ranks):
        y = top + rank * each * cell
        canvas.text(20, y + each * cell / 2 + 4, f"rank {rank}: outputs", bold=True)
        canvas.text(
            left + (rank + 0.5) * each * cell, top - 8, f"x of rank {rank}", anchor="middle"
        )
    for t, row in enumerate(seen(mesh, first_T).tolist()):
        for s, depends in enumerate(row):
            fill = EMPTY if not depends else "#4a8fd0" if t // each == s // each else "#d05050"
            canvas.rect(left + s * cell, top + t * cell, cell, cell, fill, line=PAPER)
        if first_T[t]:
            label = f"token {t} begins a document"
            canvas.text(left + tokens * cell + 10, top + (t + 1) * cell - 3, label, colour=FAINT)
    end = left + tokens * cell
    for rank in range(1, ranks):
        y, x = top + rank * each * cell, left + rank * each * cell
        canvas.line([(left, y), (end, y)], "#222")
        canvas.line([(x, top), (x, top + tokens * cell)], "#222")
    y = top + tokens * cell + 16
    for i, (name, fill) in enumerate((("own rank", "#4a8fd0"), ("halo", "#d05050"))):
        canvas.rect(left + 130 * i, y, 14, 14, fill, line=PAPER)
        canvas.text(left + 20 + 130 * i, y + 12, name)
    return canvas.svg()
