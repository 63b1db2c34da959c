"""DualPipe-V (DeepSeek-V3, arXiv:2412.19437, section 3.2.1; the V variant is in its open
repository).

DualPipe pairs a forward of one microbatch with a backward of another microbatch. While one of the
two computes, the other's expert-parallel all-to-alls communicate. The original feeds the pipeline
from both ends and keeps two copies of the weights. DualPipe-V is half of the original, folded into
a V like ZB-V, and needs one copy. Here the actions of a pair stand next to each other (``F0 B1``,
``F1 B0``), ready for a runner that overlaps their communication.

The schedule needs at least as many microbatches as stages, 2p.
"""

from __future__ import annotations

from dtron.errors import UserError
from dtron.schedules.table import Action, Table, row, table


def dualpipe_v(ranks: int, microbatches: int) -> Table:
    """Make the table of DualPipe-V. Raises UserError for fewer microbatches than stages."""
    if microbatches < 2 * ranks:
        raise UserError(
            f"schedule dualpipe-v on {ranks} ranks: needs at least {2 * ranks} microbatches, has "
            f"{microbatches}; use a smaller --micro-batch, or --pipeline.schedule zb-v"
        )

    def row_of(rank: int) -> list[Action]:
        after = ranks - rank - 1  # the number of later ranks
        phases = [
            ("F0", 2 * after),
            ("F0 F1", rank + 1),
            ("I1 W F1", after),
            ("F0 B1 F1 B0", microbatches - 2 * ranks + rank + 1),
            ("B1 F1 B0", after),
            *_drain(rank),
            ("W I0", after),
            ("W", rank + 1),
        ]
        return row([rank, 2 * ranks - 1 - rank], phases, microbatches)

    return table("dualpipe-v", 2 * ranks, microbatches, [row_of(r) for r in range(ranks)])


def _drain(rank: int) -> list[tuple[str, int]]:
    """Spell the last ``rank + 1`` backwards of each stage. The second half of these backwards
    computes only input gradients: the ranks before wait for them, and W can fill the gaps that
    follow."""
    backwards = ["B1", "B0"] * (rank + 1)
    return [(a if i <= rank else a.replace("B", "I"), 1) for i, a in enumerate(backwards)]
