"""Links: send a stage's output to the next stage.

``InProcessLinks`` is for ranks in one process: a dictionary. ``P2PLinks`` is for ranks in
several processes. From its neighbours' rows of the table it knows which messages will arrive and
in which order. It posts each receive one message ahead, so that the message arrives while the
rank computes. Messages are local tensors of one known shape.

On GPUs a message is a kernel on both ranks, and the receiving kernel spins on the GPU until the
sender's kernel runs. Two ranks deadlock if each waits for the other's message before it has sent
its own. Three things outside the table can cause this deadlock. ``PipelineGroups`` prevents
them:

- NCCL connects two ranks at their first message, and the first rank to arrive waits for the
  other. So when the groups are made, each sends one number, in an order that all ranks share.
- Within a process group NCCL runs one operation after another. A message to the next rank would
  queue behind a receive from the previous rank. So each direction between two ranks has its own
  group.
- Loading, compiling or timing a kernel may wait for everything that runs on the GPU, receives
  included. Kernels are loaded, compiled and timed when functions run for the first time. In that
  phase messages are sent through the hosts, where a rank waits for a message only when it needs the
  message.

One case is left: a later step can also wait for everything that runs on the GPU (docs/pipelining.md
describes when)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dtron.errors import LostRank
from dtron.schedules.message_slots import MessageSlots, Pair
from dtron.schedules.table import Action, Table


class Links(Protocol):
    """Links between stages.

    ``made``: the action that computed the tensor."""

    def send(self, made: Action, x: Tensor) -> None: ...

    def receive(self, made: Action) -> Tensor: ...

    def finish(self) -> None:
        """Wait for messages that are still in flight."""


class InProcessLinks:
    """Links for ranks that are all in this process."""

    def __init__(self) -> None:
        self._waiting: dict[Action, Tensor] = {}

    def send(self, made: Action, x: Tensor) -> None:
        self._waiting[made] = x

    def receive(self, made: Action) -> Tensor:
        return self._waiting.pop(made)

    def finish(self) -> None:
        assert not self._waiting, f"sent and never received: {list(self._waiting)}"


@dataclass(frozen=True)
class PipelineGroups:
    """The process groups of one line of pipeline ranks.

    ``rank``: this process's pipeline rank.
    ``peers[r]``: the process of rank r.
    ``line``: the group of all ranks.
    ``by_pair[source, goal]``: the group of one direction between two ranks.
    ``host``: a CPU (gloo) group of all ranks; None without GPUs."""

    rank: int
    peers: tuple[int, ...]
    line: Any
    by_pair: Mapping[Pair, Any]
    host: Any = None


def make_pipeline_groups(
    lines: Sequence[Sequence[int]],
    pairs: Iterable[Pair],
    device: torch.device,
    timeout: timedelta | None,
) -> PipelineGroups:
    """Make the groups between ``pairs`` of ranks of each line. Every process must call this
    function.

    ``lines``: for each line of pipeline ranks, its processes."""
    of_all = partial(dist.new_subgroups_by_enumeration, timeout=timeout)
    line = of_all(lines)[0]
    host = of_all(lines, backend="gloo")[0] if device.type == "cuda" else None
    mine = next(line for line in lines if dist.get_rank() in line)
    rank, of, number = mine.index(dist.get_rank()), {}, torch.zeros(1, device=device)
    for source, goal in sorted(pairs):
        group = of_all([[line[source], line[goal]] for line in lines])[0]
        if rank in (source, goal):
            of[source, goal] = group
            if rank == source:
                dist.send(number, mine[goal], group=group)
            else:
                dist.recv(number, mine[source], group=group)
            number.item()  # NCCL is asynchronous: wait
    return PipelineGroups(rank, tuple(mine), line, of, host)


class Progress:
    """The progress of a recorded step, which the host can read while the GPU runs the step.

    NCCL's own timeout does not cover recorded messages. So each message that has arrived adds one
    to a number in the memory of the host.

    ``awaited``: for each message that arrives in a step, the pipeline rank and the stage that sends
        it, in order."""

    def __init__(self, device: torch.device):
        self._count = torch.zeros(1, dtype=torch.int64, device=device)
        self._read = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.awaited: list[tuple[int, int]] = []

    def begin(self) -> None:
        """Begin a step."""
        self.awaited = []
        self._count.zero_()
        self._read.copy_(self._count, non_blocking=True)

    def arrived(self, source: int, stage: int) -> None:
        """Note that a message has arrived."""
        self.awaited.append((source, stage))
        self._count.add_(1)
        self._read.copy_(self._count, non_blocking=True)

    def next(self) -> tuple[int, int] | None:
        """Return the pipeline rank and the stage whose message the GPU waits for; None if all
        messages have arrived."""
        done = int(self._read[0])
        return self.awaited[done] if done < len(self.awaited) else None


@dataclass(frozen=True)
class Recording:
    """How the messages of a recorded step are sent and watched.

    ``progress``: counts the messages that have arrived.
    ``slots``: the slots of messages to and from other ranks, by rank. Messages of a rank without
        slots go through process groups."""

    progress: Progress
    slots: Mapping[int, MessageSlots]


class P2PLinks:
    """Links between processes. Stages of the same process use ``InProcessLinks``; other stages send
    messages, through ``groups``.

    ``by_host``: messages go through the hosts.
    ``empty()``: makes a buffer for one message.
    ``wrap``: turns a buffer into a stage's tensor.
    ``unwrap``: the reverse of ``wrap``.
    ``recording``: None if the step is not being recorded."""

    def __init__(
        self,
        t: Table,
        groups: PipelineGroups,
        by_host: bool,
        empty: Callable[[], Tensor],
        wrap: Callable[[Tensor], Tensor],
        unwrap: Callable[[Tensor], Tensor],
        recording: Recording | None = None,
    ):
        self._recording = recording
        self._slots = {} if recording is None else recording.slots
        if recording is not None:
            recording.progress.begin()
        self._t, self._rank, self._peers = t, groups.rank, groups.peers
        self._groups, self._by_host = groups, by_host
        self._empty, self._wrap, self._unwrap = empty, wrap, unwrap
        self._here = InProcessLinks()
        self._sent, self._received = Counter[int](), Counter[int]()  # messages in slots, by rank
        self._leaving: list[tuple[Any, Tensor]] = []
        self._coming: dict[Action, Callable[[], Tensor]] = {}
        self._to_post = {
            r: [a for a in row if t.goal(a) == self._rank]
            for r, row in enumerate(t.rows)
            if r != self._rank
        }
        for r in self._to_post:
            self._post_ahead(r)

    def send(self, made: Action, x: Tensor) -> None:
        goal = self._t.goal(made)
        if goal == self._rank:
            return self._here.send(made, x)
        assert goal is not None  # results that no rank waits for are not sent
        if goal in self._slots:
            self._slots[goal].send(self._sent[goal], self._unwrap(x))
            self._sent[goal] += 1
            return None
        if self._recording is None:  # nothing ends while a step is being recorded
            self._leaving = [(work, x) for work, x in self._leaving if not work.is_completed()]
        message, group = self._unwrap(x).contiguous(), self._group((self._rank, goal))
        with self._naming(goal):
            self._leaving.append((dist.isend(message, self._peers[goal], group=group), message))

    def receive(self, made: Action) -> Tensor:
        source = self._t.rank_of[made.stage]
        if source == self._rank:
            return self._here.receive(made)
        while made not in self._coming:
            self._post(source)
        buffer = self._coming.pop(made)()
        self._post_ahead(source)
        return self._wrap(buffer)

    def _group(self, pair: Pair) -> Any:
        return self._groups.host if self._by_host else self._groups.by_pair[pair]

    def finish(self) -> None:
        self._here.finish()
        with self._naming():
            for work, _ in self._leaving:
                work.wait()

    def _post_ahead(self, source: int) -> None:
        """Post the next receive from a rank. A message in a slot arrives without a receive."""
        if self._to_post[source] and source not in self._slots:
            self._post(source)

    def _post(self, source: int) -> None:
        made = self._to_post[source].pop(0)
        if source in self._slots:
            buffer = self._slots[source].receive(self._received[source])
            self._received[source] += 1
            self._arrived(source, made.stage)
            self._coming[made] = lambda: buffer
            return
        buffer, group = self._empty(), self._group((source, self._rank))
        with self._naming(source, made.stage):
            work = dist.irecv(buffer, self._peers[source], group=group)

        def wait() -> Tensor:
            assert work is not None  # this process is in the group
            with self._naming(source, made.stage):
                work.wait()
            self._arrived(source, made.stage)
            return buffer

        self._coming[made] = wait

    def _arrived(self, source: int, stage: int) -> None:
        if self._recording is not None:
            self._recording.progress.arrived(source, stage)

    @contextmanager
    def _naming(self, other: int | None = None, stage: int | None = None) -> Iterator[None]:
        """Turn a neighbour's death, or a hang longer than the timeout, into an error that names
        the neighbour."""
        try:
            yield
        except RuntimeError as error:
            neighbour = "a neighbour"
            if other is not None:
                s = self._t.stages_of(other)[0] if stage is None else stage
                neighbour = f"pipeline rank {other} (stage {s})"
            late = "imed out" in str(error)
            why = "no answer within --timeout-seconds" if late else "connection lost"
            raise LostRank(
                f"stage {self._t.stages_of(self._rank)[0]}: {neighbour} has died or hangs "
                f"({why}); see the output of that rank"
            ) from error
