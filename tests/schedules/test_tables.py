"""Schedules as tables: valid, timed as in the papers, and equal to torch's."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dtron.schedules import SCHEDULES, Action, Costs, check, make, peaks, simulate
from dtron.schedules.table import KINDS, Table, in_order

NAMES = st.sampled_from(list(SCHEDULES))
RANKS, VIRTUAL = st.integers(1, 6), st.integers(1, 3)
COST = st.integers(1, 9)


def sized(name: str, ranks: int, microbatches: int, stages_per_rank: int) -> Table:
    assume(name != "dualpipe-v" or microbatches >= 2 * ranks)
    return make(name, ranks, microbatches, stages_per_rank)


@settings(max_examples=200)
@given(NAMES, RANKS, st.integers(1, 25), VIRTUAL)
def test_every_table_is_valid(name, ranks, microbatches, stages_per_rank):
    """Any number of microbatches from one up. ``make`` checks the table that it makes."""
    t = sized(name, ranks, microbatches, stages_per_rank)
    assert len(t.rows) == ranks and t.stages == ranks * t.per_rank
    split = {a.kind for row in t.rows for a in row} & set("IW")
    assert bool(split) == (name in ("zb-h1", "zb-v") or (name == "dualpipe-v"))


@settings(max_examples=200)
@given(NAMES, RANKS, st.integers(1, 20), VIRTUAL, st.randoms(use_true_random=False))
def test_swapping_two_dependent_actions_fails(
    name, ranks, microbatches, stages_per_rank, rng: random.Random
):
    t = sized(name, ranks, microbatches, stages_per_rank)
    rank = rng.randrange(ranks)
    row = list(t.rows[rank])
    later = rng.choice([i for i, a in enumerate(row) if any(n in row for n in t.needs(a))])
    earlier = row.index(rng.choice([n for n in t.needs(row[later]) if n in row]))
    row[earlier], row[later] = row[later], row[earlier]
    with pytest.raises(ValueError, match="deadlock"):
        check(
            Table(
                t.name, t.stages, t.microbatches, (*t.rows[:rank], tuple(row), *t.rows[rank + 1 :])
            )
        )


F, B, I, W = (lambda s, m, k=k: Action(k, s, m) for k in "FBIW")  # noqa: E741


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[F(0, 0)], [F(1, 0), B(1, 0)]], "stage 0, microbatch 0 has F; it needs F and B"),
        ([[F(0, 0), B(0, 0), W(0, 0)], [F(1, 0), B(1, 0)]], "has F, B, W; it needs"),
        (
            [[F(0, 0), B(0, 0), B(0, 0)], [F(1, 0), B(1, 0)]],
            r"B\(stage 0, microbatch 0\) is done twice",
        ),
        ([[F(0, 0), B(0, 0)], [F(1, 0), B(1, 0), F(2, 0)]], "is no action of 2 stages"),
        ([[F(0, 0), F(1, 0)], [B(1, 0), B(0, 0)]], "stage 1 is on rank 0 and on rank 1"),
        (
            [[F(0, 0), W(0, 0), I(0, 0)], [F(1, 0), B(1, 0)]],
            "deadlock; rank 0 is at W.*waits for I",
        ),
        ([[B(0, 0), F(0, 0)], [F(1, 0), B(1, 0)]], "deadlock; rank 0 is at B.*waits for F"),
    ],
)
def test_what_is_wrong_is_named(rows, message):
    with pytest.raises(ValueError, match=message):
        check(Table("mine", 2, 1, tuple(tuple(row) for row in rows)))


@given(RANKS, st.integers(1, 25), COST, COST)
def test_the_bubble_of_1f1b(p, m, forward, backward):
    assume(m >= p)
    costs = Costs(forward, backward / 2, backward / 2)
    for name in ("1f1b", "gpipe"):
        assert simulate(make(name, p, m), costs).bubble == pytest.approx((p - 1) / (m + p - 1))


@given(RANKS, st.integers(1, 4), VIRTUAL, COST)
def test_interleaving_divides_the_idle_time(p, rounds, v, cost):
    """For microbatch counts that are a multiple of p, as in the paper. A rank has v stages, each
    1/v as long."""

    def idle(name: str, costs: Costs) -> float:
        line = simulate(make(name, p, rounds * p, v), costs)
        return line.bubble * line.makespan

    thick = idle("1f1b", Costs(cost, cost, cost))
    assert idle("interleaved", Costs(cost / v, cost / v, cost / v)) == pytest.approx(thick / v)


@given(RANKS, st.integers(0, 12), COST)
def test_zb_v_has_no_bubble(p, more, cost):
    t = make("zb-v", p, 2 * p - 1 + more)
    assert simulate(t, Costs(cost, cost, cost)).idle_inside == pytest.approx(0)
    assert max(peaks(t)) == 2 * p  # thin ones: 1F1B's peak


@given(RANKS, st.integers(0, 12), COST)
def test_zb_h1_has_a_third_of_the_bubble(p, more, cost):
    """(p - 1)(F + I - W) instead of (p - 1)(F + I + W), table 2 of the paper; and no more
    memory."""
    m = p + more
    costs = Costs(cost, cost, cost)
    idle = lambda name: simulate(make(name, p, m), costs).makespan - 3 * cost * m
    assert idle("zb-h1") == pytest.approx(idle("1f1b") / 3)
    assert max(peaks(make("zb-h1", p, m))) == max(peaks(make("1f1b", p, m))) == p


@given(RANKS, st.integers(1, 25), VIRTUAL)
def test_peaks_within_the_papers_bounds(p, m, v):
    assert peaks(make("gpipe", p, m)) == [m] * p
    assert peaks(make("1f1b", p, m)) == [min(m, p - r) for r in range(p)]
    assert max(peaks(make("zb-v", p, m))) <= 2 * p
    if m >= 2 * p:
        assert max(peaks(make("dualpipe-v", p, m))) <= 2 * p + 1
    if m % p == 0:  # (v - 1) p + 2 (p - 1) + 1 thin activations on rank 0
        assert peaks(make("interleaved", p, m, v))[0] == min(m * v, (v - 1) * p + 2 * p - 1)


@given(NAMES, RANKS, st.integers(1, 20), VIRTUAL, COST, COST, COST, st.integers(0, 3))
def test_a_timeline_keeps_every_need(name, ranks, microbatches, stages_per_rank, f, i, w, transfer):
    t = sized(name, ranks, microbatches, stages_per_rank)
    line = simulate(t, Costs(f, i, w, transfer))
    spans = {a: (start, end, r) for r, row in enumerate(line.spans) for a, start, end in row}
    assert [a for a, _, _ in line.spans[0]] == list(t.rows[0])
    for a, (start, end, rank) in spans.items():
        assert end - start == Costs(f, i, w).of(a)
        for n in t.needs(a):
            assert start >= spans[n][1] + (transfer if spans[n][2] != rank else 0)
    assert len(list(in_order(t))) == len(spans)


@given(NAMES, RANKS, st.integers(1, 20), VIRTUAL)
def test_what_is_made_goes_where_it_is_needed(name, ranks, microbatches, stages_per_rank):
    t = sized(name, ranks, microbatches, stages_per_rank)
    here = {a: rank for rank, row in enumerate(t.rows) for a in row}
    needed = {(a, rank) for b, rank in here.items() for a in t.needs(b) if a.stage != b.stage}
    assert needed == {(a, t.goal(a)) for a in here if t.goal(a) is not None}
    assert t.pairs == {(here[a], rank) for a, rank in needed if here[a] != rank}


def test_unknown_and_impossible_schedules():
    for args, message in [
        (("zbv", 2, 4), "did you mean zb-v"),
        (("1f1b", 0, 4), "ranks=0"),
        (("gpipe", 2, 0), "microbatches=0"),
        (("interleaved", 2, 4, 0), "stages_per_rank=0"),
        (("dualpipe-v", 4, 7), "at least 8 microbatches, has 7"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            make(*args)
        assert "\n" not in str(error.value)


# ---- torch's own schedules, read out of torch


def torchs(name: str, p: int, m: int, v: int) -> Table:
    from torch.distributed.pipelining import schedules as torch_schedules
    from torch.distributed.pipelining.stage import _PipelineStageBase

    class Stage(_PipelineStageBase):
        """Only the operations that a schedule asks of a stage when the schedule is made."""

        def __init__(self, index, rank, stages):
            self.stage_index, self.group_rank, self.num_stages, self.group_size = (
                index,
                rank,
                stages,
                p,
            )
            self.group = self.device = self.submod = None
            self.has_backward = False

        def _create_grad_recv_info(self, *args):
            return None

        def _prepare_forward_infra(self, *args):
            pass

        def _prepare_backward_infra(self, *args):
            pass

    cls = {
        "1f1b": torch_schedules.Schedule1F1B,
        "interleaved": torch_schedules.ScheduleInterleaved1F1B,
        "zb-v": torch_schedules.ScheduleZBVZeroBubble,
        "dualpipe-v": torch_schedules.ScheduleDualPipeV,
    }[name]
    ours = make(name, p, m, v)
    mine = [Stage(s, 0, ours.stages) for s in ours.stages_of(0)]
    if name == "1f1b":
        order = cls(mine[0], m)._get_pipeline_order()
    else:
        order = cls(mine, m).pipeline_order

    if name == "1f1b":  # torch lists the last rank's forwards from 1 up; it runs them from 0
        last = [a for a in order[p - 1] if a is not None and a.computation_type.value == "F"]
        order[p - 1] = [
            a._replace(microbatch_index=last.index(a)) if a in last else a for a in order[p - 1]
        ]

    def actions(row):
        for a in row:
            for part in (a.sub_actions or (a,)) if a is not None else ():
                if part.computation_type.value in KINDS:
                    yield Action(
                        part.computation_type.value, part.stage_index, part.microbatch_index
                    )

    rows = tuple(tuple(actions(order[r])) for r in range(p))
    theirs = Table(f"torch's {name}", ours.stages, m, rows)
    check(theirs)
    return theirs


@pytest.mark.parametrize("p", [2, 3, 4, 6])
@pytest.mark.parametrize(
    ("name", "v"),
    [("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zb-v", 2), ("dualpipe-v", 2)],
)
def test_makespan_and_peaks_are_those_of_torchs_own(name, v, p):
    compared = 0
    for m in range(1, 4 * p + 2):
        try:
            theirs = torchs(name, p, m, v)
        except ValueError as error:  # torch refuses what it does not support
            assert re.search("rounds|at least|greater than or equal", str(error))
            continue
        ours = make(name, p, m, v)
        for costs in (Costs(), Costs(1, 2, 3), Costs(3, 2, 1, 0.5)):
            assert simulate(ours, costs).makespan == pytest.approx(simulate(theirs, costs).makespan)
        assert peaks(ours) == peaks(theirs)
        compared += 1
    assert compared > p
