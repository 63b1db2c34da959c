"""The reference solution of lab 5."""

from dtron.schedules import Action, Table


def zb_h1_row(rank: int, ranks: int, microbatches: int) -> list[Action]:
    warmup = min(microbatches, ranks - rank)
    delay = rank
    actions = [Action("F", rank, m) for m in range(warmup)]
    for m in range(microbatches):
        actions.append(Action("I", rank, m))
        if m >= delay:
            actions.append(Action("W", rank, m - delay))
        if m + warmup < microbatches:
            actions.append(Action("F", rank, m + warmup))
    rest = range(max(microbatches - delay, 0), microbatches)
    return actions + [Action("W", rank, m) for m in rest]


def bubble(schedule: str, ranks: int, microbatches: int) -> float:
    idle = (ranks - 1) * (3 if schedule == "1f1b" else 1)
    return idle / (3 * microbatches + idle)


def waiting_ranks(t: Table) -> list[int]:
    done: set[Action] = set()
    rows = [list(row) for row in t.rows]
    moved = True
    while moved:
        moved = False
        for row in rows:
            while row and all(need in done for need in t.needs(row[0])):
                done.add(row.pop(0))
                moved = True
    return [rank for rank, row in enumerate(rows) if row]
