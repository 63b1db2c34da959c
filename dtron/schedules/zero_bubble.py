"""Zero-bubble schedules (Qi et al. 2023, arXiv:2401.10241).

A backward has two halves. I is the gradient of the stage's input; the rank before waits for it. W
is the gradients of the stage's weights; only the optimizer needs them. With I first, the pipeline
drains faster, and W fills time that would be idle.

**ZB-H1** (figure 3) keeps no more activations than 1F1B. Rank r has r activations fewer in flight
than rank 0. So it can delay its W by r microbatches with the same peak. The idle time is a third of
1F1B's idle time where F = I = W.

**ZB-V** (Qi et al. 2024, arXiv:2405.15362, figure 2; arXiv:2401.10241, section 6) gives each rank
two stages in the shape of a V: down the ranks and up again. So the first and the last stage are on
one rank, and a microbatch's backward starts on the rank where its forward ended. With F = I = W and
enough microbatches, no rank is idle between its first and its last action. The peak of activations
is 1F1B's peak.
"""

from __future__ import annotations

from dtron.schedules.table import Action, Table, row, table


def zb_h1(ranks: int, microbatches: int) -> Table:
    """Make the table of ZB-H1."""

    def row_of(rank: int) -> list[Action]:
        warmup = min(microbatches, ranks - rank)
        phases = [("F0", warmup)]
        for i in range(microbatches):
            late, more = i >= rank, i < microbatches - warmup
            phases.append(("I0" + " W0" * late + " F0" * more, 1))
        return row([rank], [*phases, ("W0", min(rank, microbatches))], microbatches)

    return table("zb-h1", ranks, microbatches, [row_of(r) for r in range(ranks)])


def zb_v(ranks: int, microbatches: int) -> Table:
    """Make the table of ZB-V."""
    # Rows are spelled for at least 2p - 1 microbatches, which fill the pipeline. Fewer microbatches
    # leave gaps.
    m = max(microbatches, 2 * ranks - 1)

    def row_of(rank: int) -> list[Action]:
        after = ranks - rank
        steady = m - (2 * after - 1) - rank
        phases = [
            ("F0", 2 * after - 1),  # until the first microbatch comes back up to this rank
            ("F1 F0", rank),  # microbatches on their way up and on their way down, in turn
            ("F1 I1 W1", after),  # until the first input gradient comes back from later ranks
            ("F0 I0 W0 F1 I1 W1", steady),  # no gaps from here
            ("I0 W0 F1 I1 W1", after - 1),  # the forwards of the first stage have run out
            ("I0 I1", rank),  # the ranks before wait for I, so W is delayed
            ("I0 W0", after),
            ("W", 2 * ranks),  # only W is left
        ]
        return row([rank, 2 * ranks - 1 - rank], phases, microbatches)

    return table("zb-v", 2 * ranks, microbatches, [row_of(r) for r in range(ranks)])
