"""Lab 5: schedules as tables. The student's rows are checked, timed, and executed by the runner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from dtron.course.lab import Lab, Part, Wrong, answer
from dtron.schedules import SCHEDULES, Action, Table, Timeline, make, peaks, simulate
from dtron.schedules.p2p import InProcessLinks
from dtron.schedules.runner import Program, run
from dtron.schedules.table import KINDS

Sizes = tuple[int, int]  # ranks, microbatches
VISIBLE: tuple[Sizes, ...] = ((2, 3), (4, 8))
HIDDEN: tuple[Sizes, ...] = ((3, 7), (6, 4), (1, 2))
TOLERANCE = 1e-9


def table_of(module: ModuleType, ranks: int, microbatches: int) -> Table:
    """Make the student's table. Raises Wrong with the first error of the table."""
    zb_h1_row = answer(module, "zb_h1_row")
    rows = tuple(tuple(Action(*a) for a in zb_h1_row(r, ranks, microbatches)) for r in range(ranks))
    t = Table("zb-h1", ranks, microbatches, rows)
    what = f"{ranks} ranks, {microbatches} microbatches"
    _check_rows(t, what)
    if waiting := stuck(t):
        ranks_wait = "; ".join(
            f"rank {rank} at {a} waits for {needed}" for rank, (a, needed) in waiting.items()
        )
        raise Wrong(f"{what}: deadlock: {ranks_wait}")
    return t


def _check_rows(t: Table, what: str) -> None:
    """Require that each rank has every action of its own stage once, in halves."""
    for rank, row in enumerate(t.rows):
        want = {Action(kind, rank, m) for kind in "FIW" for m in range(t.microbatches)}
        for a in row:
            if a.kind not in KINDS or a.stage != rank:
                raise Wrong(f"{what}: rank {rank} has {a}; its stage is {rank}")
            if a.kind == "B":
                raise Wrong(f"{what}: rank {rank} has {a}; ZB-H1 splits a B into I and W")
            if a not in want:
                raise Wrong(f"{what}: rank {rank} has {a} twice, or the microbatch is too high")
            want.remove(a)
        if want:
            raise Wrong(f"{what}: rank {rank} lacks {min(want, key=lambda a: a[::-1])}")


def stuck(t: Table) -> dict[int, tuple[Action, Action]]:
    """Return the ranks that wait forever: the action that each is at, and the one it waits for."""
    done: set[Action] = set()
    places, moved = [0] * len(t.rows), True
    while moved:
        moved = False
        for rank, row in enumerate(t.rows):
            while places[rank] < len(row) and done.issuperset(t.needs(row[places[rank]])):
                done.add(row[places[rank]])
                places[rank] += 1
                moved = True
    at = {r: t.rows[r][p] for r, p in enumerate(places) if p < len(t.rows[r])}
    return {r: (a, next(n for n in t.needs(a) if n not in done)) for r, a in at.items()}


def tables(sizes: Sequence[Sizes]) -> Callable[[ModuleType], None]:
    """Make a check of the table: its errors, its memory and its time."""

    def check(module: ModuleType) -> None:
        for ranks, microbatches in sizes:
            t = table_of(module, ranks, microbatches)
            what = f"{ranks} ranks, {microbatches} microbatches"
            kept, most = peaks(t), peaks(make("1f1b", ranks, microbatches))
            for rank in range(ranks):
                if kept[rank] > max(most):
                    raise Wrong(
                        f"{what}: rank {rank} keeps {kept[rank]} activations, and no rank of 1F1B "
                        f"keeps more than {max(most)}; a W must come earlier"
                    )
            took, best = simulate(t), simulate(make("zb-h1", ranks, microbatches))
            if took.makespan > best.makespan:
                late, starts, possible = _first_late(took, best)
                raise Wrong(
                    f"{what}: with F = I = W = 1 the step takes {took.makespan:g}, and ZB-H1 "
                    f"{best.makespan:g}; {late} is the first that starts late, at {starts:g} and "
                    f"not at {possible:g}"
                )

    return check


def _first_late(took: Timeline, best: Timeline) -> tuple[Action, float, float]:
    """Return the first F or I that starts later than in the best table, and both times."""
    starts = {a: start for spans in took.spans for a, start, _ in spans}
    times = sorted((start, a) for spans in best.spans for a, start, _ in spans if a.kind != "W")
    return next((a, starts[a], start) for start, a in times if starts[a] > start)


def bubbles(sizes: Sequence[Sizes]) -> Callable[[ModuleType], None]:
    """Make a check of the arithmetic: the bubble of the tables of dtron."""

    def check(module: ModuleType) -> None:
        bubble = answer(module, "bubble")
        for schedule in ("1f1b", "zb-h1"):
            for ranks, microbatches in sizes:
                want = simulate(make(schedule, ranks, microbatches)).bubble
                got = bubble(schedule, ranks, microbatches)
                if abs(got - want) > TOLERANCE:
                    raise Wrong(
                        f"{schedule}, {ranks} ranks, {microbatches} microbatches: the bubble of "
                        f"the table is {want:.4f}, and your formula says {got:.4f}"
                    )

    return check


def runs(module: ModuleType) -> None:
    """Execute the table with the runner, and compare every gradient with one device. The runner
    counts the activations."""
    ranks, microbatches = 3, 5
    t = table_of(module, ranks, microbatches)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64).normal_(generator=generator)

    weights = {s: normal(4, 4).requires_grad_() for s in range(ranks)}
    batches = [normal(2, 4) for _ in range(microbatches)]

    def stage(w: Tensor, x: Tensor, batch: Tensor) -> tuple[Tensor, None]:
        y = torch.tanh(x @ w)
        return (y.sum() if w is weights[ranks - 1] else y), None

    sums = {s: torch.zeros(4, 4, dtype=torch.float64) for s in range(ranks)}

    def take(stage: int, microbatch: int, grads: list[Tensor | None]) -> None:
        assert grads[0] is not None  # every stage uses its weight
        sums[stage] += grads[0]

    functions = Program(lambda w, batch: batch * w[0], stage)
    flat = {s: [w] for s, w in weights.items()}
    links = InProcessLinks()
    found = run(t, range(ranks), functions, weights, flat, batches, links, take)
    for rank, most in enumerate(peaks(t)):
        if found.peak[rank] != most:
            raise Wrong(f"rank {rank}: the runner keeps {found.peak[rank]} activations, not {most}")
    loss = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        x = batch * weights[0][0]
        for s in range(ranks):
            x, _ = stage(weights[s], x, batch)
        loss = loss + x
    for s, want in enumerate(torch.autograd.grad(loss, list(weights.values()))):
        if not torch.allclose(sums[s], want, atol=TOLERANCE):
            raise Wrong(f"the gradient of the weight of stage {s} differs from one device")


def deadlocks(module: ModuleType) -> None:
    """Compare the student's waiting ranks with those of tables with and without a deadlock. The
    points are the share of the deadlocks, if no table without a deadlock has waiting ranks."""
    waiting = answer(module, "waiting_ranks")
    for t in (make(name, 3, 6) for name in SCHEDULES):
        if got := waiting(t):
            raise Wrong(f"{t.name} has no deadlock, and you say that ranks {got} wait forever")
    missed = [(t, got) for t in spoilt() if sorted(got := waiting(t)) != sorted(stuck(t))]
    if missed:
        t, got = missed[0]
        n = len(spoilt())
        raise Wrong(
            f"{n - len(missed)} of {n} deadlocks are right; {t.name}: ranks {sorted(stuck(t))} "
            f"wait forever, and you say {got}",
            share=1 - len(missed) / n,
        )


def spoilt() -> list[Table]:
    """Make tables with a deadlock: two actions of a rank have changed places, or a message is never
    sent."""
    tables = []
    for name, rank, i, j in (
        ("1f1b", 0, 0, 3),
        ("1f1b", 1, 1, 2),
        ("zb-h1", 2, 0, 1),
        ("zb-h1", 1, 3, 4),
        ("zb-v", 2, 0, 3),
        ("gpipe", 0, 5, 6),
        ("gpipe", 2, 0, 11),
    ):
        t = make(name, 3, 6)
        row = list(t.rows[rank])
        row[i], row[j] = row[j], row[i]
        rows = (*t.rows[:rank], tuple(row), *t.rows[rank + 1 :])
        tables.append(Table(f"{name}, rank {rank} spoilt", t.stages, t.microbatches, rows))
    return [t for t in tables if stuck(t)]


LAB = Lab(
    5,
    "schedules",
    (
        Part("zb_h1_row", 4, tables(VISIBLE)),
        Part("zb_h1_row, executed", 1, runs),
        Part("bubble", 2, bubbles(((2, 4), (4, 8)))),
        Part("zb_h1_row, other sizes", 2, tables(HIDDEN), hidden=True),
        Part("bubble, other sizes", 1, bubbles(((3, 9), (8, 32))), hidden=True),
        Part("waiting_ranks", 4, deadlocks, hidden=True),
    ),
)
