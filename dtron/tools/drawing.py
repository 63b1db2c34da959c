"""Pictures of meshes and sharded tensors, for ``dtron.show`` and the figures of docs/.

A rank has one colour everywhere: its hue says which part of the tensor-parallel axis it is, its
lightness which part of the rest. A piece that several ranks hold is cut into stripes of their
colours, and grey where they are more than eight.
"""

from __future__ import annotations

import colorsys
import math
from collections import defaultdict
from collections.abc import Sequence

from dtron.distributed.mesh_shape import MeshShape
from dtron.tools.svg import FAINT, MANY, Canvas

Range = list[tuple[int, int]]


def colour(rank: int, shape: MeshShape) -> str:
    """One colour per rank: hue by tp, lightness by everything else."""
    other, tp = divmod(rank, shape.tp)
    others = max(shape.size // shape.tp - 1, 1)
    r, g, b = colorsys.hls_to_rgb((0.58 + tp / shape.tp) % 1, 0.58 + 0.3 * other / others, 0.6)
    return f"#{int(r * 255):02x}{int(g * 255):02x}{int(b * 255):02x}"


def draw_mesh(canvas: Canvas, x: float, y: float, shape: MeshShape, most: int = 64) -> float:
    """The ranks, tp along a row and the other axes down; returns the lower end. At most ``most``
    rows."""
    cell, height = (64, 30) if shape.tp <= 8 else (max(880 / shape.tp - 3, 6), 16)
    outer = [(a, n) for a, n in shape.sizes.items() if n > 1 and a not in ("tp", "pp")]
    rows = shape.size // shape.pp // shape.tp
    for row in range(min(rows, most)):
        rest, label = row, []
        for axis, n in reversed(outer):
            rest, i = divmod(rest, n)
            label.append(f"{axis} {i}")
        canvas.text(
            x, y + row * (height + 3) + height / 2 + 4, ", ".join(reversed(label)), colour=FAINT
        )
        for tp in range(shape.tp):
            rank = row * shape.tp + tp
            left, top = x + 130 + tp * (cell + 3), y + row * (height + 3)
            canvas.rect(left, top, cell, height, colour(rank, shape))
            if cell > 20:
                canvas.text(left + cell / 2, top + height / 2 + 4, str(rank), anchor="middle")
    end = y + min(rows, most) * (height + 3)
    if rows > most:
        canvas.text(x + 130, end + 12, f"and {rows - most} more rows", colour=FAINT)
        end += 16
    if shape.tp > 1:
        canvas.text(x + 130, end + 12, "tp: adjacent ranks", colour=FAINT)
        end += 16
    return end


def draw_tensor(
    canvas: Canvas,
    x: float,
    y: float,
    name: str,
    axes: str,
    whole: Sequence[int],
    pieces: Sequence[tuple[int, Range]],
    shape: MeshShape,
    pending: str = "",
) -> tuple[float, float]:
    """A tensor as a rectangle, leading dims down and the others across, cut into the pieces
    ``(rank, ranges)``; returns its width and height with the caption. ``pending`` names the axes of
    a sum not yet taken."""
    split = _split(whole, pieces)
    w = _pixels(math.prod(whole[split:]))
    h = _pixels(math.prod(whole[:split])) if split else 22
    canvas.text(x, y + 12, name, bold=True)
    canvas.text(x, y + 28, axes, size=11, colour=FAINT)
    top, holders = y + 36, defaultdict(list)
    for rank, ranges in pieces:
        holders[tuple(ranges)].append(rank)
    for ranges, ranks in holders.items():
        down, over = _box(ranges, whole, split)
        px, py, pw, ph = (
            x + over[0] * w,
            top + down[0] * h,
            (over[1] - over[0]) * w,
            (down[1] - down[0]) * h,
        )
        stripes = [colour(rank, shape) for rank in ranks] if len(ranks) <= 8 else [MANY]
        for i, fill in enumerate(stripes):
            canvas.rect(px + i * pw / len(stripes), py, pw / len(stripes), ph, fill, line="none")
        canvas.rect(px, py, pw, ph, dashed=bool(pending))
        label = "all ranks" if len(ranks) == shape.size > 1 else _ranks(ranks)
        if ph >= 12 and pw >= 6 * len(label):
            canvas.text(px + pw / 2, py + ph / 2 + 4, label, size=11, anchor="middle")
    if pending:
        canvas.text(x, top + h + 14, f"{{+{pending}}}: a sum still pending", size=11, colour=FAINT)
    return max(w, 7 * len(name), 6 * len(axes)), 36 + h + (18 if pending else 0)


def _split(whole: Sequence[int], pieces: Sequence[tuple[int, Range]]) -> int:
    """How many dims go down. Flattened dims keep a piece in one place if the first of them alone is
    cut, so the second dim that is cut is the first that goes across."""
    cut = [d for d, n in enumerate(whole) if any(ranges[d] != (0, n) for _, ranges in pieces)]
    return cut[1] if len(cut) > 1 else 0 if len(whole) == 1 else cut[0] if cut and cut[0] > 0 else 1


def _box(
    ranges: Range, whole: Sequence[int], split: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """``(down, over)`` as shares of the rectangle."""

    def share(first: int, end: int) -> tuple[float, float]:
        cut = [d for d in range(first, end) if ranges[d] != (0, whole[d])]
        return (
            (ranges[cut[0]][0] / whole[cut[0]], ranges[cut[0]][1] / whole[cut[0]])
            if cut
            else (0.0, 1.0)
        )

    return share(0, split), share(split, len(whole))


def _pixels(size: int) -> float:
    """Grows with the cube root: a narrow weight stays visible beside a wide one."""
    return min(max(9.0 * size ** (1 / 3), 40), 260)


def _ranks(ranks: Sequence[int]) -> str:
    """``0-3`` for a run, ``0,4`` otherwise, and a count where that would be long."""
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks)) if len(ranks) <= 4 else f"{len(ranks)} ranks"
