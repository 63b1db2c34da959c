"""Messages in slots. Each rank is a thread, and one thread runs at a time."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

import dtron.training.pipeline
from dtron.distributed import symmetric_memory
from dtron.errors import UserError
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.stages import split_into_stages
from dtron.schedules import SCHEDULES, Table, make
from dtron.schedules.message_slots import MessageSlots, Pair, slots_needed
from dtron.schedules.p2p import (
    InProcessLinks,
    Links,
    P2PLinks,
    PipelineGroups,
    Progress,
    Recording,
)
from dtron.schedules.runner import Program, run
from dtron.training.pipeline import Pipeline
from tests.helpers.runs import MODEL

WIDTH = 3


class Deadlock(Exception):
    """Every rank that has not ended waits for a signal."""


class Turns:
    """Decides at random which rank runs. A rank runs until it calls ``wait``."""

    def __init__(self, ranks: int, seed: int):
        self._changed, self._random = threading.Condition(), random.Random(seed)
        self._ready: dict[int, Callable[[], bool]] = dict.fromkeys(range(ranks), lambda: True)
        self._running: int | None = None
        self._stuck = False
        with self._changed:
            self._next()

    def wait(self, rank: int, ready: Callable[[], bool] = lambda: True) -> None:
        """Let other ranks run. Return when it is this rank's turn again and ``ready()`` holds."""
        with self._changed:
            self._ready[rank] = ready
            self._next()
        self.begin(rank)

    def begin(self, rank: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._running == rank or self._stuck)
        if self._stuck:
            raise Deadlock

    def end(self, rank: int) -> None:
        with self._changed:
            del self._ready[rank]
            self._next()

    def _next(self) -> None:
        able = [rank for rank, ready in self._ready.items() if ready()]
        self._stuck |= bool(self._ready) and not able
        self._running = self._random.choice(able) if able else None
        self._changed.notify_all()


class Shared:
    """The memory of two ranks: the handle of one of them. Other ranks may run before and after each
    signal."""

    def __init__(self, turns: Turns, ranks: tuple[int, int], own: int, memories: Any, on: set):
        self.turns, self.rank, self.own = turns, ranks[own], own
        self.memories, self.on = memories, on

    def get_buffer(self, rank, sizes, dtype, storage_offset):
        return self.memories[rank].view(dtype).view(sizes)

    def put_signal(self, dst_rank, channel=0, timeout_ms=0):
        self._change((self.own, dst_rank, channel), False)

    def wait_signal(self, src_rank, channel=0, timeout_ms=0):
        self._change((src_rank, self.own, channel), True)

    def _change(self, signal: Any, before: bool) -> None:
        self.turns.wait(self.rank, lambda: (signal in self.on) == before)
        self.on ^= {signal}
        self.turns.wait(self.rank)


def program(t: Table) -> Program:
    """Stages with one weight each, of which the first row is the number of the stage."""

    def run_stage(w, x, batch):
        y = torch.sin(x @ w[1:])
        return (y.sum() if w[0, 0] == t.stages - 1 else y), None

    return Program(lambda w, batch: batch * w[1], run_stage)


def gradients(t: Table, ranks: Sequence[int], links: Callable[[], Links]) -> dict[int, Tensor]:
    """The gradients of two steps, by stage. Each microbatch has another factor."""
    weights, totals = {}, {}
    for s in (s for r in ranks for s in t.stages_of(r)):
        value = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(s)).double()
        weights[s] = torch.cat([torch.full_like(value[:1], s), value]).requires_grad_()
        totals[s] = torch.zeros_like(weights[s])

    def take(s: int, m: int, grads: list[Tensor | None]) -> None:
        totals[s] += grads[0] * (m + 1)

    for step in range(2):
        batches = [
            torch.arange(WIDTH).double().view(1, -1) + m + step for m in range(t.microbatches)
        ]
        flat = {s: [w] for s, w in weights.items()}
        run(t, ranks, program(t), weights, flat, batches, links(), take)
    return totals


def by_slots(
    t: Table, seed: int, counts: Mapping[Pair, int], slots: type[MessageSlots] = MessageSlots
) -> dict[int, Tensor]:
    """The gradients of ranks that send every message through slots."""
    ranks = range(len(t.rows))
    turns, results, errors = Turns(len(ranks), seed), {}, []
    pairs = {(min(pair), max(pair)) for pair in t.pairs}
    memories, signals = {}, {pair: set() for pair in pairs}
    for pair in pairs:
        count = max(counts.get(p, 0) for p in (pair, pair[::-1]))
        memories[pair] = torch.full((2, count, 1, WIDTH), float("nan")).double()

    def run_rank(rank: int) -> None:
        same, peers = (lambda x: x), tuple(ranks)
        try:
            turns.begin(rank)
            own = {}
            for pair in sorted(pair for pair in pairs if rank in pair):
                i = pair.index(rank)
                handle = Shared(turns, pair, i, memories[pair], signals[pair])
                own[sum(pair) - rank] = slots(memories[pair][i], handle, i)
            groups, progress = PipelineGroups(rank, peers, None, {}), Progress(torch.device("cpu"))
            recording = Recording(progress, own)
            links = lambda: P2PLinks(t, groups, False, pytest.fail, same, same, recording)
            results.update(gradients(t, [rank], links))
            assert progress.next() is None  # all messages have been counted
        except BaseException as error:
            errors.append(error)
        finally:
            turns.end(rank)

    threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    # Every slot is free again, and no other signal is set.
    assert all(
        on == {(a, 1 - a, 2 * i + 1) for a in (0, 1) for i in range(len(memories[pair][0]))}
        for pair, on in signals.items()
    )
    return results


@st.composite
def tables(draw: st.DrawFn) -> Table:
    ranks = draw(st.integers(2, 4))
    name = draw(st.sampled_from(list(SCHEDULES)))
    rounds = draw(st.integers(1, 3))
    count = ranks * rounds if name == "interleaved" else draw(st.integers(1, 9))
    try:
        return make(name, ranks, count)
    except UserError:  # too few microbatches for the schedule
        reject()


def check(t: Table, seed: int, slots: type[MessageSlots] = MessageSlots) -> None:
    want = gradients(t, range(len(t.rows)), InProcessLinks)
    got = by_slots(t, seed, slots_needed(t), slots)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[s], want[s]) for s in want)


@given(tables(), st.integers(0, 2**32))
@settings(max_examples=60)
def test_every_schedule_gets_the_messages_in_any_order_of_the_ranks(t, seed):
    check(t, seed)


class NotAwaited(MessageSlots):
    """A mutant: it writes into a slot that may be full."""

    def send(self, number: int, x: Tensor) -> None:
        slot = number % self._count
        self._others[slot].copy_(x)
        self._buffer.wait_signal(self._peer, channel=2 * slot + 1)
        self._buffer.put_signal(self._peer, channel=2 * slot)


class TooEarly(MessageSlots):
    """A mutant: it frees a slot before it has read the message."""

    def receive(self, number: int) -> Tensor:
        slot = number % self._count
        self._buffer.wait_signal(self._peer, channel=2 * slot)
        self._buffer.put_signal(self._peer, channel=2 * slot + 1)
        return self._own[slot].clone()


@pytest.mark.parametrize("mutant", [NotAwaited, TooEarly])
def test_a_slot_that_is_not_guarded_is_caught(mutant):
    with pytest.raises(AssertionError):
        for seed in range(20):
            check(make("zb-v", 3, 9), seed, mutant)


def test_too_few_slots_deadlock():
    t = make("interleaved", 2, 8)
    with pytest.raises(Deadlock):
        by_slots(t, 0, dict.fromkeys(t.pairs, 1))


@pytest.mark.parametrize(("host_ranks", "with_slots"), [(4, [0, 2]), (2, [0]), (1, [])])
def test_ranks_of_one_host_have_slots(monkeypatch, host_ranks, with_slots):
    """Rank 1 of a pipeline of four, on hosts of 4, 2 and 1 GPUs. Slots are made once for each size
    of a message."""
    made = []

    def shared(size: int, group: str) -> tuple[Tensor, Any]:
        made.append((group, size))
        memory = torch.zeros(size, dtype=torch.uint8)
        turns, signals = Turns(1, 0), set()
        return memory, Shared(turns, (0, 0), 0, [memory] * 2, signals)

    monkeypatch.setattr(dtron.training.pipeline, "shared", shared)
    monkeypatch.setattr(symmetric_memory, "_gpus_access_each_other", lambda count: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(host_ranks))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: int(group[0] != "1"))
    t = make("1f1b", 4, 8)
    groups = PipelineGroups(1, (0, 1, 2, 3), None, {p: f"{p[0]} to {p[1]}" for p in t.pairs})
    specs = tuple(split_into_stages(replace(MODEL, layers=4), [1] * 4))
    template = torch.empty(0, MODEL.embed, dtype=torch.bfloat16)
    pipe = Pipeline(t, specs, Layout(), groups, template, copy_engines=True)
    batch = make_batch(torch.zeros(2, 17, dtype=torch.long), Layout())
    pipe.prepare_recording(batch)
    pipe.prepare_recording(batch)
    assert sorted(pipe.slots[8, 32]) == with_slots  # microbatches, tokens
    size = slots_needed(t)[0, 1] * 32 * MODEL.embed * 2
    assert made == [(f"{min(1, r)} to {max(1, r)}", size) for r in with_slots]
    without = replace(pipe, copy_engines=False, slots={})
    without.prepare_recording(batch)
    assert not without.slots
