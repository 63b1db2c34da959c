"""1F1B: one forward, one backward (Narayanan et al. 2019, PipeDream, SOSP, figure 4; with the flush
of Narayanan et al. 2021, arXiv:2104.04473, figure 4 top).

A rank starts with forwards, until the first microbatch comes back to the rank. From then on each
backward frees the memory for the activations of the next forward. So rank r keeps ``ranks - r``
activations, for any number of microbatches. The bubble is (p - 1) / (m + p - 1) for p ranks and m
microbatches: ranks are idle while the pipeline fills and drains.
"""

from __future__ import annotations

from dtron.schedules.table import Action, Table, row, table


def one_f_one_b(ranks: int, microbatches: int) -> Table:
    """Make the table of 1F1B."""

    def row_of(rank: int) -> list[Action]:
        warmup = min(microbatches, ranks - rank)
        phases = [("F0", warmup), ("B0 F0", microbatches - warmup), ("B0", warmup)]
        return row([rank], phases, microbatches)

    return table("1f1b", ranks, microbatches, [row_of(r) for r in range(ranks)])
