"""Interleaved 1F1B (Narayanan et al. 2021, arXiv:2104.04473, figure 4 bottom).

Each rank has ``stages_per_rank`` = v thin stages instead of one thick stage: stage s is on rank s
mod p. A microbatch passes all ranks v times. Filling the pipeline takes the time of thin stages, so
the idle time is divided by v. The cost is v times as many transfers, and somewhat more activations.

Microbatches run in *rounds*. Within a round a rank runs all microbatches through its first stage,
then through its second stage, and so on. In the paper a round is p microbatches, and the number of
microbatches must be a multiple of p. Here the microbatches are distributed over ``m // p`` rounds
as evenly as possible, so any number is allowed.
"""

from __future__ import annotations

from itertools import zip_longest

from dtron.schedules.table import Action, Table, table


def interleaved(ranks: int, microbatches: int, stages_per_rank: int = 2) -> Table:
    """Make the table of interleaved 1F1B."""
    rounds = _rounds(microbatches, max(1, microbatches // ranks))

    def row_of(rank: int) -> list[Action]:
        chunks = range(stages_per_rank)
        forwards = [Action("F", c * ranks + rank, m) for r in rounds for c in chunks for m in r]
        backwards = [
            Action("B", c * ranks + rank, m) for r in rounds for c in reversed(chunks) for m in r
        ]
        # Forwards of all but the last stage of a round, and two forwards for every later rank.
        warmup = (stages_per_rank - 1) * len(rounds[0]) + 2 * (ranks - 1 - rank)
        pairs = zip_longest(forwards[warmup:], backwards)
        return forwards[:warmup] + [a for pair in pairs for a in pair if a is not None]

    rows = [row_of(r) for r in range(ranks)]
    return table("interleaved", ranks * stages_per_rank, microbatches, rows)


def _rounds(microbatches: int, count: int) -> list[range]:
    """Return ``count`` ranges of microbatches, the longer ranges first."""
    size, longer = divmod(microbatches, count)
    starts = [i * size + min(i, longer) for i in range(count + 1)]
    return [range(a, b) for a, b in zip(starts, starts[1:], strict=False)]
