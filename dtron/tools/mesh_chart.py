"""Draws the ranks of a mesh on their hosts, with the groups of rank 0.

A large mesh is drawn in part: the first hosts of the first pipeline ranks. All others are alike."""

from __future__ import annotations

from collections.abc import Sequence

from dtron.distributed.mesh_shape import MeshShape
from dtron.planner.mesh_places import axes_in_use, coordinates, group_of
from dtron.tools.html_page import FAINT, IDLE, INK, PAPER, RULE, series
from dtron.tools.svg import Canvas

MOST_ROWS = 8
CELL, GAP = 56, 3


def mesh_chart(shape: MeshShape, host_size: int, width: float = 1100) -> Canvas:
    """Draw a mesh.

    ``host_size``: the GPUs of a host."""
    canvas = Canvas(width, INK, PAPER)
    groups = {axis: set(group_of(shape, axis, 0)) for axis in axes_in_use(shape)}
    y, each = 0.0, shape.size // shape.pp
    if each % host_size or shape.pp == 1:
        hosts = -(-shape.size // host_size)
        shown = range(min(hosts, MOST_ROWS))  # in half as many rows
        y = _rows(canvas, y, shape, host_size, groups, shown)
        if hosts > len(shown):
            y = _more(canvas, y, f"and {hosts - len(shown)} more hosts like these")
        return canvas
    for stage in range(min(shape.pp, MOST_ROWS)):
        first, hosts = stage * each // host_size, each // host_size
        text = f"pipeline rank {stage}: hosts {first} to {first + hosts - 1}"
        one = f"pipeline rank {stage}: host {first}"
        y = _more(canvas, y, text if hosts > 1 else one, bold=True)
        shown = range(first, first + min(hosts, 2 * max(1, MOST_ROWS // 2 // shape.pp)))
        y = _rows(canvas, y, shape, host_size, groups, shown)
        if hosts > len(shown):
            y = _more(canvas, y - 4, f"and {hosts - len(shown)} more hosts like these")
    if shape.pp > MOST_ROWS:
        _more(canvas, y, f"and {shape.pp - MOST_ROWS} more pipeline ranks like these")
    return canvas


def axis_fills(shape: MeshShape) -> dict[str, str]:
    """Return the colour of each axis."""
    return {axis: series(i) for i, axis in enumerate(axes_in_use(shape))}


def _rows(
    canvas: Canvas,
    y: float,
    shape: MeshShape,
    host_size: int,
    groups: dict[str, set[int]],
    hosts: Sequence[int],
) -> float:
    """Draw hosts, two in a row. Return the lower end."""
    wide = 56 + min(host_size, 8) * (CELL + GAP) + GAP
    tall = 40 * (-(-host_size // 8)) + GAP
    for i, host in enumerate(hosts):
        x, top = (i % 2) * (wide + 12), y + i // 2 * (tall + 8)
        canvas.rect(x + 0.5, top + 0.5, wide, tall, "none", line=RULE)
        canvas.text(x + 8, top + 24, f"host {host}", size=11, colour=FAINT)
        ranks = range(host * host_size, min((host + 1) * host_size, shape.size))
        for slot, rank in enumerate(ranks):
            left = x + 56 + slot % 8 * (CELL + GAP)
            _cell(canvas, left, top + GAP + slot // 8 * 40, shape, groups, rank)
    return y + -(-len(hosts) // 2) * (tall + 8)


def _cell(
    canvas: Canvas,
    x: float,
    y: float,
    shape: MeshShape,
    groups: dict[str, set[int]],
    rank: int,
) -> None:
    place = ", ".join(f"{axis} {i}" for axis, i in coordinates(shape, rank).items())
    own = [axis for axis, ranks in groups.items() if rank in ranks]
    title = f"rank {rank}: {place or 'one device'}"
    title += f"\nin rank 0's groups of {', '.join(own)}" if own else ""
    with canvas.mark(title, data_rank=rank):
        canvas.rect(x, y, CELL, 37, IDLE, line=INK if rank == 0 else "none")
        canvas.text(x + CELL / 2, y + 15, str(rank), anchor="middle", bold=rank == 0)
        fills = axis_fills(shape)
        left = x + CELL / 2 - 5.5 * len(own)
        for i, axis in enumerate(own):
            canvas.rect(left + 11 * i + 1, y + 23, 9, 9, fills[axis], line="none")


def _more(canvas: Canvas, y: float, text: str, bold: bool = False) -> float:
    canvas.text(0, y + 14, text, bold=bold, colour=None if bold else FAINT)
    return y + 22
