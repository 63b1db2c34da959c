"""A pipeline schedule is a table: one row of actions per pipeline rank, executed from left to
right.

The model is split into *stages*, the batch into *microbatches*. An action is one of

    F  the forward of a microbatch through a stage
    B  its backward: the gradients of the stage's input and of its weights
    I  the first half of a backward: the gradient of the input; the stage before waits for it
    W  the second half: the gradients of the weights; no stage waits for them

A schedule is only the order of each rank's actions. It moves no data and knows no time: a rank runs
the next action of its row as soon as the action's input has arrived. So a schedule can be made,
checked, timed and drawn without a model, and one runner executes every schedule (runner.py).

Left out: actions for communication. The messages follow from the table, because an action needs
only

    F(s, m)  <-  F(s-1, m)
    B(s, m)  <-  F(s, m)  and  B(s+1, m), or I(s+1, m)       (I the same)
    W(s, m)  <-  I(s, m)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

KINDS = "FBIW"


class Action(NamedTuple):
    """One action of a rank.

    ``kind``: one of ``KINDS``."""

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}(stage {self.stage}, microbatch {self.microbatch})"


@dataclass(frozen=True)
class Table:
    """The actions of all pipeline ranks. Stages and microbatches count from 0.

    ``rows[r]``: the actions of pipeline rank r."""

    name: str
    stages: int
    microbatches: int
    rows: tuple[tuple[Action, ...], ...]

    @cached_property
    def rank_of(self) -> dict[int, int]:
        """The pipeline rank of each stage."""
        return {a.stage: rank for rank, row in enumerate(self.rows) for a in row}

    @cached_property
    def actions(self) -> set[Action]:
        """All actions of all ranks."""
        return {a for row in self.rows for a in row}

    @cached_property
    def order(self) -> Iterable[tuple[int, Action]]:
        """All actions in the order of ``in_order``, which is computed once for all steps."""
        return tuple(in_order(self))

    @property
    def in_halves(self) -> bool:
        """Whether a backward runs in two halves."""
        return any(a.kind == "I" for a in self.actions)

    @property
    def per_rank(self) -> int:
        """The number of stages on each rank."""
        return self.stages // len(self.rows)

    def stages_of(self, rank: int) -> list[int]:
        """Return the stages of a rank."""
        return sorted(s for s, r in self.rank_of.items() if r == rank)

    def needs(self, action: Action) -> list[Action]:
        """Return the actions that must end before this action can start, besides the actions before
        it in its row."""
        kind, s, m = action
        if kind == "F":
            return [Action("F", s - 1, m)] if s else []
        if kind == "W":
            return [Action("I", s, m)]
        return [Action("F", s, m), *self.gradient_from(s, m)]

    def gradient_from(self, stage: int, microbatch: int) -> list[Action]:
        """Return the action of the next stage that computes the gradient of this stage's output.
        The last stage has no such action."""
        if stage == self.stages - 1:
            return []
        whole = Action("B", stage + 1, microbatch)
        return [whole if whole in self.actions else Action("I", stage + 1, microbatch)]

    def goal(self, made: Action) -> int | None:
        """Return the rank that waits for the result of an action; None if no rank does."""
        step = {"F": 1, "B": -1, "I": -1}.get(made.kind)
        return None if step is None else self.rank_of.get(made.stage + step)

    @property
    def pairs(self) -> set[tuple[int, int]]:
        """All pairs of ranks, sender and receiver, between which messages are sent."""
        sent = {(rank, self.goal(a)) for rank, row in enumerate(self.rows) for a in row}
        return {(source, goal) for source, goal in sent if goal not in (None, source)}


def table(name: str, stages: int, microbatches: int, rows: Sequence[Sequence[Action]]) -> Table:
    """Make a table and check it. Raises ValueError where ``check`` does."""
    made = Table(name, stages, microbatches, tuple(tuple(row) for row in rows))
    check(made)
    return made


def row(
    stages: Sequence[int], phases: Sequence[tuple[str, int]], microbatches: int
) -> list[Action]:
    """Spell a row: ``[("F0", 3), ("F1 I1 W1", 2)]`` is three forwards of the rank's first stage,
    then twice a forward, an input gradient and a weight gradient of its second stage. Every kind
    takes the microbatches in order. A bare ``W`` belongs to the oldest I that still has no W.

    ``stages``: the rank's stages.
    ``microbatches``: the number of microbatches. Later microbatches are left out, so a schedule may
        be spelled for more microbatches than there are."""
    next_microbatch: dict[str, int] = {}
    pending: list[tuple[int, int]] = []
    actions = []
    for pattern, times in phases:
        for token in pattern.split() * times:
            if token == "W":
                if not pending:
                    continue
                stage, m = pending.pop(0)
            else:
                # A whole backward counts as its two halves, so a later I or W takes the microbatch
                # after it.
                stage = stages[int(token[1])]
                m = next_microbatch.get(token.replace("B", "I"), 0)
                for key in (token, token.replace("B", "I"), token.replace("B", "W")):
                    next_microbatch[key] = m + 1
                if token[0] == "I":
                    pending.append((stage, m))
                elif token[0] == "W":
                    pending.remove((stage, m))
            actions.append(Action(token[0], stage, m))
    return [a for a in actions if a.microbatch < microbatches]


def check(t: Table) -> None:
    """Raise ValueError with the first error in a table. In a table without errors every microbatch
    passes every stage once in each direction, all actions of a stage are on one rank, and blocking
    receives never deadlock."""
    ranks: dict[int, int] = {}
    seen: set[Action] = set()
    for rank, actions in enumerate(t.rows):
        for a in actions:
            inside = 0 <= a.stage < t.stages and 0 <= a.microbatch < t.microbatches
            if a.kind not in KINDS or not inside:
                raise ValueError(f"{t.name}, rank {rank}: {a} is no action of {_size(t)}")
            if a in seen:
                raise ValueError(f"{t.name}, rank {rank}: {a} is done twice")
            if ranks.setdefault(a.stage, rank) != rank:
                raise ValueError(
                    f"{t.name}: stage {a.stage} is on rank {ranks[a.stage]} and on rank {rank}"
                )
            seen.add(a)
    for stage in range(t.stages):
        for m in range(t.microbatches):
            have = "".join(k for k in KINDS if Action(k, stage, m) in seen)
            if have not in ("FB", "FIW"):
                raise ValueError(
                    f"{t.name}: stage {stage}, microbatch {m} has {', '.join(have) or 'nothing'}; "
                    "it needs F and B, or F, I and W"
                )
    _ = t.order  # raises ValueError for a deadlock


def in_order(t: Table) -> Iterator[tuple[int, Action]]:
    """Yield ``(rank, action)`` of all actions in an order that respects every need, each row from
    left to right. Raises ValueError for a deadlock, where no rank can go on."""
    done: set[Action] = set()
    places = [0] * len(t.rows)
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(t.rows):
            while places[rank] < len(actions) and all(
                n in done for n in t.needs(actions[places[rank]])
            ):
                yield rank, actions[places[rank]]
                done.add(actions[places[rank]])
                places[rank] += 1
                moved = True
    stuck = [(r, t.rows[r][p]) for r, p in enumerate(places) if p < len(t.rows[r])]
    if stuck:
        rank, a = stuck[0]
        missing = next(n for n in t.needs(a) if n not in done)
        raise ValueError(
            f"{t.name}: deadlock; rank {rank} is at {a}, which waits for {missing} on rank "
            f"{t.rank_of.get(missing.stage)}, and no rank can go on"
        )


def peaks(t: Table, splits: bool = True) -> list[int]:
    """Return the largest number of activations that each rank keeps at once. A microbatch's
    activations in a stage are kept from its F to its B or W.

    ``splits``: False: an I is a whole backward, and frees them."""
    ends = {"F": 1, "B": -1, "W": -1, "I": 0} if splits else {"F": 1, "B": -1, "I": -1, "W": 0}
    most_of_ranks = []
    for actions in t.rows:
        alive = most = 0
        for a in actions:
            alive += ends[a.kind]
            most = max(most, alive)
        most_of_ranks.append(most)
    return most_of_ranks


@dataclass(frozen=True)
class Costs:
    """The time of one stage's actions, and the time to send an activation to another rank. A B
    takes the time of I and W."""

    F: float = 1.0
    I: float = 1.0  # noqa: E741  (the field's letter)
    W: float = 1.0
    transfer: float = 0.0

    def of(self, action: Action) -> float:
        return self.I + self.W if action.kind == "B" else getattr(self, action.kind)


@dataclass(frozen=True)
class Timeline:
    """The start and the end of each action.

    ``spans[rank]``: ``[(action, start, end)]``."""

    table: Table
    spans: list[list[tuple[Action, float, float]]]

    @property
    def makespan(self) -> float:
        return max(end for spans in self.spans for _, _, end in spans)

    @property
    def bubble(self) -> float:
        """The share of all ranks' time that is idle."""
        busy = sum(end - start for spans in self.spans for _, start, end in spans)
        return 1 - busy / (self.makespan * len(self.spans))

    @property
    def idle_inside(self) -> float:
        """The longest idle time of a rank between its first and its last action."""
        return max(s[-1][2] - s[0][1] - sum(end - start for _, start, end in s) for s in self.spans)


def simulate(
    t: Table, costs: Costs | Callable[[Action], float] = Costs(), transfer: float = 0.0
) -> Timeline:
    """Time a table.

    ``costs``: each action's time by its kind, or a function of the action.
    ``transfer``: the time to send an activation, if ``costs`` is a function."""
    if isinstance(costs, Costs):
        transfer, costs = costs.transfer, costs.of
    ends: dict[Action, float] = {}
    spans: list[list] = [[] for _ in t.rows]
    for rank, a in t.order:
        ready = spans[rank][-1][2] if spans[rank] else 0.0
        for n in t.needs(a):
            ready = max(ready, ends[n] + (transfer if t.rank_of[n.stage] != rank else 0.0))
        ends[a] = ready + costs(a)
        spans[rank].append((a, ready, ends[a]))
    return Timeline(t, spans)


def _size(t: Table) -> str:
    return f"{t.stages} stages and {t.microbatches} microbatches"
