"""How what a stage makes reaches the next one.

``InProcessLinks`` is for ranks in one process: a dictionary. ``P2PLinks`` is for processes: it
knows, from the rows of its neighbours, which messages will come and in which order, and posts each
receive one message ahead, so that it arrives while the rank computes. Messages are local tensors of
one known shape.

On GPUs a message is a kernel at either end, and the one that receives waits on the GPU, in a loop,
for the one that sends. Two ranks that wait for each other's messages before they have sent their
own never end, and three things beside the table can bring that about. ``PipelineGroups`` keeps them
apart:

- NCCL connects two ranks in their first message, and the one that comes first waits for the other. So when
  ways are made, each is tried with one number, in an order that all ranks share.
- Within a process group NCCL does one thing after another, so a message to the rank after would queue up
  behind one that is awaited from the rank before. So each direction between two ranks is a group of its own.
- Loading a kernel, compiling one and timing it may wait for all that runs on a GPU, receives included. That
  happens where functions run for the first time, and then messages go by way of the hosts, where nobody
  waits for them until they are needed.

What is left: a later step can wait for all that runs, too (docs/pipelining.md says when).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dtron.errors import LostRank
from dtron.schedules.table import Action, Table

Pair = tuple[int, int]  # pipeline ranks: who sends, who receives


class Links(Protocol):
    """How a stage's output reaches the next stage. ``made`` is the action that made the tensor."""

    def send(self, made: Action, x: Tensor) -> None: ...

    def receive(self, made: Action) -> Tensor: ...

    def finish(self) -> None:
        """Wait for what is still on its way."""


class InProcessLinks:
    """All ranks are here."""

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
    """The process groups of a line of pipeline ranks, of which this process is ``rank``.
    ``peers[r]`` is the process of rank r, ``line`` the group of all, and ``of[source, goal]`` that
    of one direction between two. ``host`` is a group of all that needs no GPU; None where there is
    none to wait for."""

    rank: int
    peers: tuple[int, ...]
    line: Any
    of: Mapping[Pair, Any]
    host: Any = None


def make_ways(
    lines: Sequence[Sequence[int]],
    pairs: Sequence[Pair],
    device: torch.device,
    timeout: timedelta | None,
) -> PipelineGroups:
    """The ways between ``pairs`` of ranks of each line; every process calls this."""
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
            number.item()  # NCCL has only begun
    return PipelineGroups(rank, tuple(mine), line, of, host)


class P2PLinks:
    """Between processes. Stages that share one hand over, others send, by ``ways`` or ``by_host``.
    ``empty()`` makes a buffer for one message, ``wrap`` turns it into a stage's tensor, and
    ``unwrap`` the reverse."""

    def __init__(
        self,
        t: Table,
        ways: PipelineGroups,
        by_host: bool,
        empty: Callable[[], Tensor],
        wrap: Callable[[Tensor], Tensor],
        unwrap: Callable[[Tensor], Tensor],
    ):
        self._t, self._rank, self._peers = t, ways.rank, ways.peers
        self._group = (lambda pair: ways.host) if by_host else ways.of.__getitem__
        self._empty, self._wrap, self._unwrap = empty, wrap, unwrap
        self._here = InProcessLinks()
        self._leaving: list[tuple[Any, Tensor]] = []
        self._coming: dict[Action, tuple[Any, Tensor]] = {}
        self._to_post = {
            r: [a for a in row if t.goal(a) == self._rank]
            for r, row in enumerate(t.rows)
            if r != self._rank
        }
        for r in self._to_post:
            self._post(r)

    def send(self, made: Action, x: Tensor) -> None:
        goal = self._t.goal(made)
        if goal == self._rank:
            return self._here.send(made, x)
        self._leaving = [(work, kept) for work, kept in self._leaving if not work.is_completed()]
        part, group = self._unwrap(x).contiguous(), self._group((self._rank, goal))
        with self._naming(goal):
            self._leaving.append((dist.isend(part, self._peers[goal], group=group), part))

    def receive(self, made: Action) -> Tensor:
        source = self._t.rank_of[made.stage]
        if source == self._rank:
            return self._here.receive(made)
        while made not in self._coming:
            self._post(source)
        work, buffer = self._coming.pop(made)
        with self._naming(source, made.stage):
            work.wait()
        self._post(source)
        return self._wrap(buffer)

    def finish(self) -> None:
        self._here.finish()
        with self._naming():
            for work, _ in self._leaving:
                work.wait()

    def _post(self, source: int) -> None:
        if self._to_post[source]:
            made, buffer = self._to_post[source].pop(0), self._empty()
            group = self._group((source, self._rank))
            with self._naming(source, made.stage):
                self._coming[made] = (dist.irecv(buffer, self._peers[source], group=group), buffer)

    @contextmanager
    def _naming(self, other: int | None = None, stage: int | None = None) -> Iterator[None]:
        """A neighbour that has died, or hangs for longer than the timeout, is an error that names
        it."""
        try:
            yield
        except RuntimeError as error:
            who = "a neighbour"
            if other is not None:
                s = self._t.stages_of(other)[0] if stage is None else stage
                who = f"pipeline rank {other} (stage {s})"
            why = "no answer within --timeout" if "imed out" in str(error) else "connection lost"
            raise LostRank(
                f"stage {self._t.stages_of(self._rank)[0]}: {who} has died or hangs ({why}); see what it said"
            ) from error
