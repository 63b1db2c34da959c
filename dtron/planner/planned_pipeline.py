"""The pipeline of a rank in a plan: messages between stages are noted, and not sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dtron.distributed.redistribute import to_local
from dtron.model.batch import Batch
from dtron.planner.operators import Operator
from dtron.planner.rank_trace import MESSAGES, RankTrace
from dtron.schedules.p2p import InProcessLinks, Links
from dtron.schedules.table import Action, Table, in_order
from dtron.training.pipeline import Pipeline


class PlannedLinks:
    """Links (schedules/p2p.py) of one rank. A message to or from another rank is an operator of
    ``trace``.

    ``empty``: makes the tensor of a message."""

    def __init__(self, t: Table, rank: int, trace: RankTrace, empty: Callable[[], Tensor]):
        self._t, self._rank, self._trace, self._empty = t, rank, trace, empty
        self._here = InProcessLinks()

    def send(self, made: Action, x: Tensor) -> None:
        if self._t.goal(made) == self._rank:
            return self._here.send(made, x)
        self._note("send", made, x)
        return None

    def receive(self, made: Action) -> Tensor:
        if self._t.rank_of[made.stage] == self._rank:
            return self._here.receive(made)
        with self._trace.making(MESSAGES):
            x = self._empty()
        self._note("receive", made, x)
        return x

    def finish(self) -> None:
        self._here.finish()

    def _note(self, direction: str, made: Action, x: Tensor) -> None:
        name = f"{direction} {made.kind}{made.stage}.{made.microbatch}"
        self._trace.operators.append(Operator("message", name, written=to_local(x).nbytes))


@dataclass(frozen=True)
class MarkedTable(Table):
    """A schedule that notes in ``trace`` where each action of ``rank`` ends."""

    rank: int = 0
    trace: Any = field(default=None, compare=False)

    @cached_property
    def order(self) -> Iterable[tuple[int, Action]]:
        return _MarkedOrder(self)


@dataclass
class _MarkedOrder:
    """The order of a table. An action has ended when the runner asks for the next one."""

    table: MarkedTable

    def __iter__(self) -> Iterator[tuple[int, Action]]:
        for rank, a in in_order(self.table):
            yield rank, a
            if rank == self.table.rank:
                self.table.trace.mark(f"{a.kind}{a.stage}.{a.microbatch}")


@dataclass(frozen=True)
class PlannedPipeline(Pipeline):
    """The stages of one pipeline rank.

    ``rank``: the rank.
    ``trace``: takes its messages."""

    rank: int = 0
    trace: Any = field(default=None, compare=False)

    @property
    def ranks(self) -> list[int]:
        return [self.rank]

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def links(self, batch: Batch, table: Table | None = None, by_host: bool = False) -> Links:
        assert self.template is not None
        template, tokens = self.template, self._tokens(batch)

        def empty() -> Tensor:
            x = template.new_empty(tokens, template.shape[1])
            return self.layout.from_local(x, "tokens_sp", "act_embed")

        return PlannedLinks(table or self.table, self.rank, self.trace, empty)

    def reduce_tied_embedding(self, grads: tuple[Any, ...]) -> tuple[Any, ...]:
        trees = dict(zip(self.stages, grads, strict=True))
        own = [s for s in self.twins or () if s in trees]
        if len(own) == 1:
            w = trees[own[0]].embedding.w_tokens
            self.trace.operators.append(Operator("message", "tied", written=to_local(w).nbytes))
            return grads
        return super().reduce_tied_embedding(grads)

    def _reduce(self, value: Tensor | None, neutral: float, op: Any) -> Tensor:
        zero = torch.zeros((), dtype=torch.float64)
        return zero if value is None else value.to(torch.float64)
