"""GPipe (Huang et al. 2018, arXiv:1811.06965, figure 2c): all forwards, then all backwards.

The bubble is as large as 1F1B's bubble, but a rank keeps the activations of every microbatch at
once."""

from __future__ import annotations

from dtron.schedules.table import Table, row, table


def gpipe(ranks: int, microbatches: int) -> Table:
    """Make the table of GPipe."""
    m = microbatches
    return table("gpipe", ranks, m, [row([r], [("F0", m), ("B0", m)], m) for r in range(ranks)])
