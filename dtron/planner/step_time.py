"""The time of a step: the operators of all pipeline ranks, run against the rates of a GPU.

A rank has a stream of kernels, one stream of messages for each process group, and a stream of
copies to and from its host. A kernel begins when the kernel before it has ended. A collective
begins when the kernels before it have ended and its group is free; the kernels after it go on,
until one waits for it. So communication is hidden as far as the program hides it. A message to
another pipeline rank ends the waiting of that rank.

Left out: differences between ranks, and the time in which the host launches a step that is not
recorded."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dtron.distributed.mesh_shape import MeshShape, is_part
from dtron.planner.gpu_rates import Gpu, Link, work_of
from dtron.planner.operators import Operator
from dtron.planner.plan_step import RankPlan


def _floats() -> defaultdict[str, float]:
    return defaultdict(float)


PARTS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}


@dataclass(frozen=True)
class Span:
    """A part of a rank's time: ``kind`` from ``start`` to ``end``, in seconds.

    ``name``: the stage and the microbatch as ``0.3``; empty: those of no action."""

    kind: str
    start: float
    end: float
    name: str = ""


@dataclass
class Message:
    """A message of a rank, from ``start`` to ``end``, in seconds.

    ``axis``: its mesh axis, or "host".
    ``exposed``: the seconds before ``end`` in which the rank waits for it."""

    axis: str
    name: str
    start: float
    end: float
    nbytes: float
    exposed: float = 0.0


@dataclass
class RankTime:
    """The time of one pipeline rank, in seconds.

    ``busy``: time of kernels by kind; "gaps" between them.
    ``ghz``, ``watts``: the mean clock and power of its GPU.
    ``exposed``, ``hidden``: time of communication by mesh axis, with and without kernels beside.
    ``bubble``: time in which the rank waits for messages of other stages.
    ``sent``: bytes that a rank sends, by mesh axis.
    ``spans``: the actions of the schedule, the reduction of gradients and the update, in order. The
        wait for an action's input is before its span.
    ``waits``: where the rank waits for messages of other stages.
    ``messages``: collectives, messages that it sends to other stages, and copies to its host."""

    now: float = 0.0
    ghz: float = 0.0
    watts: float = 0.0
    busy: defaultdict[str, float] = field(default_factory=_floats)
    exposed: defaultdict[str, float] = field(default_factory=_floats)
    hidden: defaultdict[str, float] = field(default_factory=_floats)
    sent: defaultdict[str, float] = field(default_factory=_floats)
    bubble: float = 0.0
    spans: list[Span] = field(default_factory=list)
    waits: list[Span] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)


def link_of(shape: MeshShape, axis: str, gpu: Gpu) -> str:
    """Return the link of a mesh axis: "nvlink" if each of its groups is within one host."""
    ranks, span = 1, 1
    for atom, n in reversed(shape.atoms.items()):
        ranks *= n
        if atom == axis or is_part(atom, axis):
            span = ranks  # the first and the last rank of a group are less than this apart
    return "nvlink" if gpu.gpus_of_a_host % span == 0 else "network"


def axis_size(shape: MeshShape, axis: str) -> int:
    atoms = shape.atoms
    return atoms[axis] if axis in atoms else shape.parts(axis)


def bytes_sent(op: Operator, n: int) -> float:
    """Return the bytes that a rank of n sends in a collective by a ring."""
    share = (n - 1) / n
    return op.written * share * (2 if op.name == "all_reduce" else 1)


class _Rank:
    """The clock of one pipeline rank."""

    def __init__(self, plan: RankPlan, shape: MeshShape, gpu: Gpu, copy_engines: bool, ghz: float):
        self.plan, self.shape, self.gpu, self.ghz = plan, shape, gpu, ghz
        self.copy_engines = copy_engines
        self.time = RankTime()
        self.place = 0
        self.work = _floats()  # seconds of kernels by work_of
        self._open: dict[int, Message] = {}
        self._streams: dict[str, float] = {}
        self._nccl_until = 0.0
        self._span_start = 0.0
        self._links = {
            group: (axis, axis_size(shape, axis), link_of(shape, axis, gpu))
            for group, axis in plan.groups.items()
        }
        # DTensor joins the axes of a sum over several axes in a group of its own.
        atoms = [atom for atom in shape.atoms if atom != "pp"] or ["dp"]
        size = shape.size // shape.pp
        self._whole = ("several axes", size, link_of(shape, atoms[0], gpu))

    def run(self, arrivals: dict[str, float]) -> bool:
        """Run until a message is missing. Return whether the rank has ended.

        ``arrivals``: when each message arrives. Messages of this rank are added."""
        ops, time = self.plan.operators, self.time
        while self.place < len(ops):
            op = ops[self.place]
            if op.kind == "message" and not self._message(op, arrivals):
                return False
            if op.kind == "mark":
                self._span(op.name)
            elif op.kind == "collective":
                self._collective(op)
            elif op.kind == "wait":
                self._wait(op.token)
            elif op.kind == "host":
                start = max(self._streams.get("host", 0.0), time.now)
                end = start + op.written / self.gpu.host_gbs * 1e-9
                time.messages.append(Message("host", op.name, start, end, op.written))
                self._streams["host"] = end
            elif op.kind != "message":
                self._kernel(op)
            self.place += 1
        time.now = max(time.now, self._streams.get("host", 0.0))
        self._span("update")
        return True

    def _span(self, name: str) -> None:
        """End a span of time. The name of an action is that of planned_pipeline.py."""
        kind, action = (PARTS[name[0]], name[1:]) if name[0] in PARTS else (name, "")
        self.time.spans.append(Span(kind, self._span_start, self.time.now, action))
        self._span_start = self.time.now

    def _kernel(self, op: Operator) -> None:
        seconds = self.gpu.seconds(op, self.ghz)
        if self._nccl_until > self.time.now:
            seconds *= self.gpu.beside_nccl
        gap = self.gpu.gap_us * 1e-6
        self.time.busy[op.kind] += seconds
        self.work[work_of(op)] += seconds
        self.time.busy["gaps"] += gap
        self.time.now += seconds + gap

    def _collective(self, op: Operator) -> None:
        axis, n, link = self._links.get(op.group, self._whole)
        sent = bytes_sent(op, n)
        by_copies = (
            self.copy_engines and link == "nvlink" and op.name in ("all_gather", "all_to_all")
        )
        way: Link = self.gpu.links["copy_engines" if by_copies else link]
        stream = f"{op.group} copies" if by_copies else op.group
        start = max(self.time.now, self._streams.get(stream, 0.0))
        end = start + way.seconds(sent)
        self._streams[stream] = end
        if by_copies:  # they take memory's time from the kernels beside
            seconds = 2 * sent / self.gpu.memory_gbs * 1e-9
            self.time.busy["copies"] += seconds
            self.time.now += seconds
        self._open[op.token] = message = Message(axis, op.name, start, end, sent)
        self.time.messages.append(message)
        self.time.sent[axis] += sent
        if not by_copies:
            self._nccl_until = max(self._nccl_until, end)

    def _wait(self, token: int) -> None:
        if token not in self._open:
            return
        message = self._open.pop(token)
        axis, took = message.axis, message.end - message.start
        message.exposed = max(0.0, message.end - self.time.now)
        self.time.exposed[axis] += message.exposed
        self.time.hidden[axis] += max(0.0, took - message.exposed)
        self.time.now = max(self.time.now, message.end)

    def _message(self, op: Operator, arrivals: dict[str, float]) -> bool:
        direction, _, name = op.name.partition(" ")
        time, link = self.time, self.gpu.links[link_of(self.shape, "pp", self.gpu)]
        took, now = link.seconds(op.written), time.now
        if direction == "send":
            arrivals[name] = now + took
            time.sent["pp"] += op.written
            time.messages.append(Message("pp", f"send {name}", now, now + took, op.written))
        elif direction == "receive":
            if name not in arrivals:
                return False
            waited = max(0.0, arrivals[name] - now)
            time.bubble += waited
            time.now += waited
            if waited:
                time.waits.append(Span("waits for stages", now, time.now, name))
            if self._span_start == now:
                self._span_start = time.now
        else:
            time.exposed["pp"] += took
            time.now += took
            message = Message("pp", "embedding's gradient", now, time.now, op.written, took)
            time.messages.append(message)
        return True


def time_step(
    plans: Sequence[RankPlan], shape: MeshShape, gpu: Gpu, copy_engines: bool = True
) -> list[RankTime]:
    """Return the times of all pipeline ranks. The longest is the time of the step.

    A first pass has the clock of the rates. Its mix of work gives each rank's clock.

    ``copy_engines``: whether GPUs of one host copy the weights and gradients of ZeRO-3."""
    ranks = _run([_Rank(plan, shape, gpu, copy_engines, gpu.ghz) for plan in plans])
    clocks = [gpu.clock(r.work, r.time.now - sum(r.work.values())) for r in ranks]
    again = [
        _Rank(plan, shape, gpu, copy_engines, ghz) for plan, ghz in zip(plans, clocks, strict=True)
    ]
    for first, rank in zip(ranks, _run(again), strict=True):
        rank.time.ghz = rank.ghz
        waiting = first.time.now - sum(first.work.values())
        rank.time.watts = gpu.power(first.work, waiting, rank.ghz)
    return [rank.time for rank in again]


def _run(ranks: list[_Rank]) -> list[_Rank]:
    """Run all ranks to their end."""
    arrivals: dict[str, float] = {}
    left = list(ranks)
    while left:
        going = [rank for rank in left if not rank.run(arrivals)]
        if len(going) == len(left) and not any(_can_go_on(rank, arrivals) for rank in going):
            raise AssertionError("a message of the pipeline is never sent")
        left = going
    return ranks


def _can_go_on(rank: _Rank, arrivals: Mapping[str, float]) -> bool:
    op = rank.plan.operators[rank.place]
    return op.name.partition(" ")[2] in arrivals


def seconds_of(times: Sequence[RankTime]) -> float:
    """Return the time of the step."""
    return max((t.now for t in times), default=math.nan)
