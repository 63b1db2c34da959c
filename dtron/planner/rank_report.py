"""What one rank of a mesh launches and sends in a step, as tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.planner.gpu_rates import Gpu
from dtron.planner.mesh_places import axes_in_use, coordinates, group_of, ranks_text
from dtron.planner.operators import Operator
from dtron.planner.plan_step import RankPlan
from dtron.planner.step_time import axis_size, bytes_sent, link_of

NO_KERNEL = ("collective", "wait", "message", "mark")


@dataclass(frozen=True)
class RankMessage:
    """A message of a rank.

    ``axis``: its mesh axis.
    ``kind``: a collective, "send" or "receive".
    ``nbytes``: bytes of the tensor on one rank, before it is sharded or after it is unsharded.
    ``sent``: bytes that the rank sends."""

    axis: str
    kind: str
    nbytes: int
    sent: float


def check_rank(rank: int, shape: MeshShape) -> None:
    """Raises UserError if the mesh has no such rank."""
    if not 0 <= rank < shape.size:
        raise UserError(
            f"--trace {rank}: mesh {shape} has ranks 0 to {shape.size - 1}; choose one of them"
        )


def message_of(op: Operator, plan: RankPlan, shape: MeshShape) -> RankMessage | None:
    """Return an operator as a message; None for a kernel."""
    if op.kind == "message":
        kind = op.name.partition(" ")[0]
        return RankMessage("pp", kind, op.written, 0 if kind == "receive" else op.written)
    if op.kind != "collective":
        return None
    axis = plan.groups.get(op.group)
    n = shape.size // shape.pp if axis is None else axis_size(shape, axis)
    return RankMessage(axis or "several axes", op.name, op.written, bytes_sent(op, n))


def place_lines(rank: int, shape: MeshShape, gpu: Gpu) -> list[str]:
    """Return lines with the host of a rank, and its group on each axis."""
    place = ", ".join(f"{axis} {i}" for axis, i in coordinates(shape, rank).items())
    host, slot = divmod(rank, gpu.gpus_of_a_host)
    lines = [f"rank {rank} of {shape.size:,}: {place or 'one device'}; GPU {slot} of host {host}"]
    for axis in axes_in_use(shape):
        ranks = group_of(shape, axis, rank)
        link = link_of(shape, axis, gpu)
        lines.append(f"{axis}: ranks {ranks_text(ranks)} ({len(ranks)} ranks, {link})")
    return lines


def _sums(rows: Iterable[tuple[tuple[str, str], tuple[float, ...]]]) -> dict[Any, list[float]]:
    """Return for each key the number of its rows, and the sum of each of their numbers."""
    found: dict[tuple[str, str], list[float]] = {}
    for key, numbers in rows:
        before = found.get(key, [0.0] * (1 + len(numbers)))
        found[key] = [a + b for a, b in zip(before, (1, *numbers), strict=True)]
    return found


def kernel_table(plan: RankPlan, gpu: Gpu) -> Table:
    """A row for each kernel of a library, and one for the fused kernels, by what they compute."""
    sums = _sums(
        ((op.kind, op.name), (op.flops, op.read + op.written, seconds_of(op, gpu)))
        for op in plan.operators
        if op.kind not in NO_KERNEL
    )
    out = Table(title="kernels of a step")
    for name in ("kind", "kernel", "count", "TFLOP", "GB", "ms"):
        out.add_column(name, justify="left" if name in ("kind", "kernel") else "right")
    for (kind, name), (count, flops, nbytes, took) in sorted(sums.items(), key=_slowest_first):
        work = f"{flops / 1e12:.2f}" if flops else ""
        cells = (work, f"{nbytes / 1e9:.2f}", f"{1e3 * took:,.2f}")
        out.add_row(kind, name, f"{count:,.0f}", *cells)
    return out


def _slowest_first(row: tuple[tuple[str, str], list[float]]) -> tuple[str, float]:
    return row[0][0], -row[1][-1]


def seconds_of(op: Operator, gpu: Gpu) -> float:
    """Return the time of a kernel, or of a copy to or from the host."""
    return op.written / gpu.host_gbs * 1e-9 if op.kind == "host" else gpu.seconds(op)


def message_table(plan: RankPlan, shape: MeshShape, gpu: Gpu) -> Table:
    """A row for each axis and kind of message."""
    messages = (message_of(op, plan, shape) for op in plan.operators)
    sums = _sums(((x.axis, x.kind), (x.nbytes, x.sent)) for x in messages if x is not None)
    out = Table(title="messages of a step")
    for name in ("axis", "kind", "link", "count", "GB of tensors", "GB sent"):
        out.add_column(name, justify="left" if name in ("axis", "kind", "link") else "right")
    for (axis, kind), (count, *nbytes) in sorted(sums.items()):
        cells = (f"{n / 1e9:.3f}" for n in nbytes)
        out.add_row(axis, kind, _link(shape, axis, gpu), f"{count:,.0f}", *cells)
    return out


def _link(shape: MeshShape, axis: str, gpu: Gpu) -> str:
    outermost = next((atom for atom in shape.atoms if atom != "pp"), "dp")
    return link_of(shape, outermost if axis == "several axes" else axis, gpu)


def as_json(plan: RankPlan, rank: int, shape: MeshShape, gpu: Gpu) -> str:
    """Return one line: the rank's place, its groups, and its operators in order."""
    groups = {axis: group_of(shape, axis, rank) for axis in axes_in_use(shape)}
    found = {"mesh": str(shape), "rank": rank, "place": coordinates(shape, rank), "groups": groups}
    return json.dumps(found | {"operators": [*_in_order(plan, shape, gpu)]})


def _in_order(plan: RankPlan, shape: MeshShape, gpu: Gpu) -> Iterator[dict[str, Any]]:
    """Yield the operators in the order in which the rank launches them. A mark ends an action of
    the schedule."""
    for op in plan.operators:
        if op.kind in ("mark", "wait"):
            yield {"kind": op.kind} | (
                {"name": op.name} if op.kind == "mark" else {"token": op.token}
            )
        elif (message := message_of(op, plan, shape)) is not None:
            name = op.name.partition(" ")[2] if op.kind == "message" else ""
            entry: dict[str, Any] = {"kind": "message", "name": message.kind, "axis": message.axis}
            entry |= {"bytes": message.nbytes, "sent_bytes": round(message.sent)}
            yield entry | ({"of": name} if name else {"token": op.token})
        else:
            yield {
                "kind": op.kind,
                "name": op.name,
                "size": op.size,
                "flops": op.flops,
                "bytes": op.read + op.written,
                "us": round(1e6 * seconds_of(op, gpu), 3),
            }
