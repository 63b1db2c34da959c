"""Pipeline schedules: tables of actions, without a model and without torch. See table.py for the
idea, and ``python -m dtron.schedules compare`` for all schedules side by side."""

from __future__ import annotations

import difflib
import math

from dtron.errors import UserError
from dtron.schedules.dualpipe import dualpipe_v
from dtron.schedules.gpipe import gpipe
from dtron.schedules.interleaved import interleaved
from dtron.schedules.one_f_one_b import one_f_one_b
from dtron.schedules.table import Action, Costs, Table, Timeline, check, peaks, simulate
from dtron.schedules.zero_bubble import zb_h1, zb_v

__all__ = [
    "SCHEDULES",
    "Action",
    "Costs",
    "Table",
    "Timeline",
    "check",
    "make",
    "peaks",
    "simulate",
]

SCHEDULES = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb-h1": zb_h1,
    "zb-v": zb_v,
    "dualpipe-v": dualpipe_v,
}


def stages_of_rank(name: str, stages_per_rank: int = 2) -> int:
    """Return the number of stages of each rank under a schedule."""
    return {"interleaved": stages_per_rank, "zb-v": 2, "dualpipe-v": 2}.get(name, 1)


LARGEST = 1 << 22  # actions of one kind in a table; more would take minutes


def make(name: str, ranks: int, microbatches: int, stages_per_rank: int = 2) -> Table:
    """Make the table of a schedule by name. Raises UserError for an unknown name, and for
    impossible sizes."""
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name, SCHEDULES, n=1, cutoff=0.0)[0]
        raise UserError(
            f"schedule {name!r}: unknown; did you mean {near}? There are {', '.join(SCHEDULES)}"
        )
    sizes = {
        "ranks": ranks,
        "microbatches": microbatches,
        "stages_per_rank": stages_per_rank,
    }
    for size, n in sizes.items():
        if n < 1:
            raise UserError(f"schedule {name}: {size}={n}; there must be at least 1")
    if math.prod(sizes.values()) > LARGEST:
        raise UserError(
            f"schedule {name}: {ranks} ranks, {microbatches} microbatches and {stages_per_rank} "
            f"stages per rank make a table of more than {LARGEST} rows; use fewer microbatches"
        )
    extra = (stages_per_rank,) if name == "interleaved" else ()
    return SCHEDULES[name](ranks, microbatches, *extra)
