"""Draws meshes and sharded tensors, for ``dtron.show`` and the figures of docs/.

A rank has the same colour in every picture. Its hue is its index on the tensor-parallel axis, its
lightness the index on all other axes. A shard that several ranks hold has a stripe for each rank,
or is grey if more than eight ranks hold it.
"""

from __future__ import annotations

import colorsys
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from dtron.checkpoint.shard_range import Range
from dtron.distributed.mesh_shape import MeshShape
from dtron.tools.svg import FAINT, MANY, Canvas


@dataclass(frozen=True)
class TensorPicture:
    """A sharded tensor to draw.

    ``name``: the title.
    ``axes``: the caption; names of the dims and their mesh axes.
    ``size``: the size of the whole tensor.
    ``shards``: pairs of a rank and the ranges of its shard, one range per dim.
    ``pending``: mesh axes over which a sum is pending."""

    name: str
    axes: str
    size: Sequence[int]
    shards: Sequence[tuple[int, Sequence[Range]]]
    pending: str = ""


def colour(rank: int, shape: MeshShape) -> str:
    """Return the colour of a rank: hue by tp, lightness by all other axes."""
    other, tp = divmod(rank, shape.tp)
    others = max(shape.size // shape.tp - 1, 1)
    r, g, b = colorsys.hls_to_rgb((0.58 + tp / shape.tp) % 1, 0.58 + 0.3 * other / others, 0.6)
    return f"#{int(r * 255):02x}{int(g * 255):02x}{int(b * 255):02x}"


def draw_mesh(canvas: Canvas, x: float, y: float, shape: MeshShape, most: int = 64) -> float:
    """Draw the ranks, with tp along a row and the other axes down. Returns the lower end.

    ``most``: the maximum number of rows."""
    cell, height = (64, 30) if shape.tp <= 8 else (max(880 / shape.tp - 3, 6), 16)
    outer = [(a, n) for a, n in shape.sizes.items() if n > 1 and a not in ("tp", "pp")]
    rows = shape.size // shape.pp // shape.tp
    for row in range(min(rows, most)):
        rest, label = row, []
        for axis, n in reversed(outer):
            rest, i = divmod(rest, n)
            label.append(f"{axis} {i}")
        middle = y + row * (height + 3) + height / 2 + 4
        canvas.text(x, middle, ", ".join(reversed(label)), colour=FAINT)
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
    canvas: Canvas, x: float, y: float, tensor: TensorPicture, shape: MeshShape
) -> tuple[float, float]:
    """Draw a tensor as a rectangle of its shards at (x, y), with leading dims down and the other
    dims across. Returns width and height, caption included."""
    split = _dims_down(tensor)
    w = _pixels(math.prod(tensor.size[split:]))
    h = _pixels(math.prod(tensor.size[:split])) if split else 22
    canvas.text(x, y + 12, tensor.name, bold=True)
    canvas.text(x, y + 28, tensor.axes, size=11, colour=FAINT)
    top, holders = y + 36, defaultdict(list)
    for rank, ranges in tensor.shards:
        holders[tuple(ranges)].append(rank)
    for ranges, ranks in holders.items():
        down, across = _shares(ranges, tensor.size, split)
        px, pw = x + across[0] * w, (across[1] - across[0]) * w
        py, ph = top + down[0] * h, (down[1] - down[0]) * h
        stripes = [colour(rank, shape) for rank in ranks] if len(ranks) <= 8 else [MANY]
        for i, fill in enumerate(stripes):
            canvas.rect(px + i * pw / len(stripes), py, pw / len(stripes), ph, fill, line="none")
        canvas.rect(px, py, pw, ph, dashed=bool(tensor.pending))
        label = "all ranks" if len(ranks) == shape.size > 1 else _ranks(ranks)
        if ph >= 12 and pw >= 6 * len(label):
            canvas.text(px + pw / 2, py + ph / 2 + 4, label, size=11, anchor="middle")
    if tensor.pending:
        label = f"{{+{tensor.pending}}}: a sum still pending"
        canvas.text(x, top + h + 14, label, size=11, colour=FAINT)
    width = max(w, 7 * len(tensor.name), 6 * len(tensor.axes))
    return width, 36 + h + (18 if tensor.pending else 0)


def _dims_down(tensor: TensorPicture) -> int:
    """Return the number of dims that go down.

    A shard is contiguous in flattened dims if only the first of them is sharded. So the second
    sharded dim is the first dim across."""
    sharded = [
        d
        for d, n in enumerate(tensor.size)
        if any(ranges[d] != (0, n) for _, ranges in tensor.shards)
    ]
    if len(sharded) > 1:
        return sharded[1]
    if len(tensor.size) == 1:
        return 0
    return sharded[0] if sharded and sharded[0] > 0 else 1


Share = tuple[float, float]


def _shares(ranges: Sequence[Range], size: Sequence[int], split: int) -> tuple[Share, Share]:
    """Return the part of the rectangle that a shard covers, down and across, from 0 to 1."""

    def share(dims: range) -> Share:
        sharded = [d for d in dims if ranges[d] != (0, size[d])]
        if not sharded:
            return 0.0, 1.0
        d = sharded[0]
        return ranges[d][0] / size[d], ranges[d][1] / size[d]

    return share(range(split)), share(range(split, len(size)))


def _pixels(size: int) -> float:
    """Return a length that grows with the cube root, so that a narrow weight stays visible beside a
    wide weight."""
    return min(max(9.0 * size ** (1 / 3), 40), 260)


def _ranks(ranks: Sequence[int]) -> str:
    """Return ``0-3`` for adjacent ranks and ``0,4`` for others; the count if the list is long."""
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks)) if len(ranks) <= 4 else f"{len(ranks)} ranks"
