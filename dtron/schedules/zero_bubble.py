"""Zero-bubble schedules (Qi et al. 2023, arXiv:2401.10241).

A backward is two halves: I, the gradient of the stage's input, which the rank before is waiting
for, and W, the gradients of its weights, which nobody needs before the optimizer. Doing I first
lets the pipeline drain faster, and W fills what would be idle.

**ZB-H1** (figure 3) keeps no more activations than 1F1B. Rank r puts its W off by r microbatches:
it has r activations fewer in flight than rank 0, and spends them on that. The idle time is a third
of 1F1B's where F = I = W.

**ZB-V** (Qi et al. 2024, arXiv:2405.15362, figure 2; arXiv:2401.10241, section 6) gives each rank
two stages in the shape of a V: down the ranks and up again, so that the last stage is where the
first is and a microbatch's backward starts where its forward ended. With F = I = W and enough
microbatches no rank is idle between its first action and its last, with 1F1B's peak of activations.
"""

from __future__ import annotations

from dtron.schedules.table import Table, row, table


def zb_h1(ranks: int, microbatches: int) -> Table:
    def of(rank: int):
        ahead = min(microbatches, ranks - rank)
        phases = [("F0", ahead)]
        for i in range(microbatches):
            late, more = i >= rank, i < microbatches - ahead
            phases.append(("I0" + " W0" * late + " F0" * more, 1))
        return row([rank], [*phases, ("W0", min(rank, microbatches))], microbatches)

    return table("zb-h1", ranks, microbatches, [of(r) for r in range(ranks)])


def zb_v(ranks: int, microbatches: int) -> Table:
    # Spelled for at least 2p - 1 microbatches, what it takes to fill the pipeline; fewer leave
    # gaps.
    m = max(microbatches, 2 * ranks - 1)

    def of(rank: int):
        after = ranks - rank
        steady = m - (2 * after - 1) - rank
        phases = [
            ("F0", 2 * after - 1),  # until the first microbatch has come back up to this rank,
            ("F1 F0", rank),  # on its way up in turn with those still going down,
            ("F1 I1 W1", after),  # until the first input gradient comes back from below;
            ("F0 I0 W0 F1 I1 W1", steady),  # no gaps from here,
            ("I0 W0 F1 I1 W1", 2 * after - 1 + rank - after - rank),  # the forwards run out,
            ("I0 I1", rank),  # and those before this rank wait for I, so W waits,
            ("I0 W0", after),
            ("W", 2 * ranks),  # until only W is left.
        ]
        return row([rank, 2 * ranks - 1 - rank], phases, microbatches)

    return table("zb-v", 2 * ranks, microbatches, [of(r) for r in range(ranks)])
