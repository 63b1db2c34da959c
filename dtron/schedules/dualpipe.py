"""DualPipe-V (DeepSeek-V3, arXiv:2412.19437, section 3.2.1; the V variant is in its open
repository).

DualPipe pairs a forward of one microbatch with a backward of another, so that while one computes,
the other's expert-parallel all-to-alls are on the wire. The original feeds the pipeline from both
ends and keeps two copies of the weights; cut in half and folded into a V, like ZB-V, it needs one.
The pairs stand next to each other here (``F0 B1``, ``F1 B0``); whoever overlaps their communication
finds them so.

Needs at least as many microbatches as stages, 2p.
"""

from __future__ import annotations

from dtron.errors import UserError
from dtron.schedules.table import Table, row, table


def dualpipe_v(ranks: int, microbatches: int) -> Table:
    """Raises UserError for fewer microbatches than stages."""
    if microbatches < 2 * ranks:
        raise UserError(
            f"schedule dualpipe-v on {ranks} ranks: needs at least {2 * ranks} microbatches, has "
            f"{microbatches}; use a smaller --micro-batch, or --pipeline.schedule zb-v"
        )

    def of(rank: int):
        after = ranks - rank - 1  # ranks below this one
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

    return table("dualpipe-v", 2 * ranks, microbatches, [of(r) for r in range(ranks)])


def _drain(rank: int) -> list[tuple[str, int]]:
    """The last ``rank + 1`` backwards of each stage. In the second half of them only the input
    gradients are made: the ranks above are waiting, and W can fill the gaps that follow."""
    backwards = ["B1", "B0"] * (rank + 1)
    return [(a if i <= rank else a.replace("B", "I"), 1) for i, a in enumerate(backwards)]
