"""1F1B: one forward, one backward (Narayanan et al. 2019, PipeDream, SOSP, figure 4; with the flush
of Narayanan et al. 2021, arXiv:2104.04473, figure 4 top).

A rank starts with as many forwards as it takes the first microbatch to come back to it; from then
on each backward frees the activations that the next forward needs. So rank r keeps ``ranks - r``
activations, however many microbatches there are. The bubble is (p - 1) / (m + p - 1) for p ranks
and m microbatches: idle while the pipeline fills and drains.
"""

from __future__ import annotations

from dtron.schedules.table import Table, row, table


def one_f_one_b(ranks: int, microbatches: int) -> Table:
    def of(rank: int):
        ahead = min(microbatches, ranks - rank)
        return row(
            [rank], [("F0", ahead), ("B0 F0", microbatches - ahead), ("B0", ahead)], microbatches
        )

    return table("1f1b", ranks, microbatches, [of(r) for r in range(ranks)])
