"""Interleaved 1F1B (Narayanan et al. 2021, arXiv:2104.04473, figure 4 bottom).

Each rank has ``stages_per_rank`` = v thin stages instead of one thick one: stage s is on rank s mod
p. A microbatch passes all ranks v times, and filling the pipeline takes thin stages: the idle time
is divided by v. It costs as many times more transfers, and somewhat more
activations.

Microbatches go in *rounds*. Within a round a rank runs them all through its first stage, then
through its second, and so on. In the paper a round is p microbatches, and their number must be a
multiple. Here they are dealt out to ``m // p`` rounds as evenly as possible, so any number will do.
"""

from __future__ import annotations

from itertools import zip_longest

from dtron.schedules.table import Action, Table, table


def interleaved(ranks: int, microbatches: int, stages_per_rank: int = 2) -> Table:
    rounds = _rounds(microbatches, max(1, microbatches // ranks))

    def of(rank: int) -> list[Action]:
        chunks = range(stages_per_rank)
        forwards = [Action("F", c * ranks + rank, m) for r in rounds for c in chunks for m in r]
        backwards = [
            Action("B", c * ranks + rank, m) for r in rounds for c in reversed(chunks) for m in r
        ]
        # Forwards of all but the last stage of a round, and two for every rank that comes after.
        ahead = min((stages_per_rank - 1) * len(rounds[0]) + 2 * (ranks - 1 - rank), len(forwards))
        pairs = zip_longest(forwards[ahead:], backwards)
        return forwards[:ahead] + [a for pair in pairs for a in pair if a is not None]

    return table(
        "interleaved", ranks * stages_per_rank, microbatches, [of(r) for r in range(ranks)]
    )


def _rounds(microbatches: int, count: int) -> list[range]:
    """``count`` ranges of microbatches, the longer ones first."""
    size, longer = divmod(microbatches, count)
    starts = [i * size + min(i, longer) for i in range(count + 1)]
    return [range(a, b) for a, b in zip(starts, starts[1:], strict=False)]
