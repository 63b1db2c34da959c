"""Planted faults on real ranks: a process that is stopped in short bursts, a slow disk of data, and
a slow disk of checkpoints. Each is named with its rank and host, and no other rank is."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given
from hypothesis import strategies as st

import train
from dtron.checkpoint.slow_writes import FACTOR, LEAST, Write, slow_writes
from dtron.runtime.pauses import PERIOD, TOLERANCE, Pauses
from tests.helpers.ranks import Ranks
from tests.helpers.train_cli import TINY

SLOW = 1  # the rank
EVERY = 30

# ---- the rules, without a clock


@given(late=st.lists(st.sampled_from([0.0, 0.01, 0.029, 0.031, 0.5, 3.0]), max_size=30))
def test_pauses_are_the_time_that_a_thread_wakes_late(late):
    now, wakes = 0.0, iter(late)

    def wait(seconds: float) -> bool:
        nonlocal now
        more = next(wakes, None)
        now += seconds + (more or 0.0)
        return more is None

    pauses = Pauses(lambda: now, wait)
    pauses.run()
    assert pauses.read() == pytest.approx(sum(x for x in late if x > TOLERANCE))
    assert pauses.read() == 0.0 and PERIOD < TOLERANCE


def test_a_pause_is_counted_once_and_the_thread_ends():
    ticks = count()
    pauses = Pauses(clock=lambda: float(next(ticks)))  # each look at the clock is a second later
    pauses.start()
    while pauses.read() == 0.0:
        pass
    pauses.close()
    thread = next((t for t in threading.enumerate() if t.name == "pauses"), None)
    if thread is not None:
        thread.join(30)
        assert not thread.is_alive()


@given(
    ranks=st.integers(2, 40),
    place=st.floats(0, 0.999),
    seconds=st.floats(0.01, 20),
    size=st.integers(1, 10**10),
    seed=st.randoms(use_true_random=False),
)
def test_the_rank_with_the_slow_disk_is_named_and_no_other(ranks, place, seconds, size, seed):
    noise = lambda: seed.uniform(1, FACTOR / 2)
    writes = [Write(f"host-{r}", size, seconds * noise()) for r in range(ranks)]
    assert slow_writes(writes, "s3://a") == []
    slow = int(place * ranks)
    longer = writes[slow].seconds * FACTOR * FACTOR / 2 + 2 * LEAST
    planted = [*writes[:slow], writes[slow]._replace(seconds=longer), *writes[slow + 1 :]]
    (line,) = slow_writes(planted, "s3://a")
    assert line.startswith(f"rank {slow} (host-{slow}) took ") and line.endswith("under s3://a")
    larger = planted[slow]._replace(size=10 * size, seconds=9 * writes[slow].seconds)
    assert slow_writes([*writes[:slow], larger, *writes[slow + 1 :]], "s3://a") == []


# ---- real ranks


@contextmanager
def running(run_dir: Path, *argv: str, main: Any = train.main) -> Iterator[Ranks]:
    """Two ranks that train until the body ends. They end then as after a SIGTERM."""
    usual = [*TINY, "--eval-every=0", "--sample-tokens=0", "--log-every=1", "--steps=1000000"]
    flags = [*usual, "--mesh=dp=2", f"--run-dir={run_dir}", *argv]
    ranks = Ranks(flags, 2, run_dir.with_name("output.txt"), main)
    try:
        yield ranks
        for process in ranks.processes:
            process.terminate()
        assert ranks.codes() == [0, 0], ranks.output.read_text()
    finally:
        ranks.kill([0, 1])


def until(ranks: Ranks, text: str, stop: Sequence[int] = ()) -> None:
    """Wait until the ranks have said this. Processes of ``stop`` are stopped in bursts."""
    while text not in ranks.output.read_text():
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in stop:
                os.kill(process, number)
            assert not ranks.ended(0.1), ranks.output.read_text()


def last_step(ranks: Ranks) -> int:
    return int(re.findall(r"^step +(\d+)/", ranks.output.read_text(), re.M)[-1])


def named(ranks: Ranks, cause: str) -> list[tuple[int, int]]:
    """The step and the rank of each line that names a rank for this cause. The host is this one."""
    here = re.escape(socket.gethostname())
    line = rf"^warning: step (\d+): rank (\d+) \({here}\) is slow in {cause}: "
    return [(int(a), int(b)) for a, b in re.findall(line, ranks.output.read_text(), re.M)]


@pytest.mark.slow
def test_a_rank_that_is_stopped_in_bursts_is_named(run_dir):
    with running(run_dir, f"--watch-every={EVERY}") as ranks:
        until(ranks, f" {2 * EVERY}/1000000")
        begun = last_step(ranks)
        until(ranks, "stands still", [ranks.processes[SLOW].pid])
    found = named(ranks, "pauses")
    assert min(step for step, rank in found if rank == SLOW) <= begun + 4 * EVERY
    assert {rank for step, rank in found if step > begun + EVERY} <= {SLOW}


class SlowSource:
    """A source of rows whose disk is slow."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def rows(self, start: int, size: int) -> Any:
        time.sleep(0.3)  # many times a step: less would be hidden by reading ahead
        return self._source.rows(start, size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def train_on_a_slow_disk(argv: list[str]) -> int:
    """train.py, whose rank ``SLOW`` has a slow source."""
    open_data = train.open_data

    def opened(*arguments: Any) -> Any:
        data = open_data(*arguments)
        slow = os.environ["RANK"] == str(SLOW)
        return replace(data, train=SlowSource(data.train)) if slow else data

    with mock.patch.object(train, "open_data", opened):
        return train.main(argv)


@pytest.mark.slow
def test_a_slow_disk_of_data_is_named(run_dir):
    with running(run_dir, "--watch-every=4", main=train_on_a_slow_disk) as ranks:
        until(ranks, "is slow in data")
    found = named(ranks, "data")
    assert {rank for _, rank in found} == {SLOW} and found[0][0] <= 16


class SlowDisk(LocalFileSystem):
    """A file system of fsspec that opens a file of rank ``SLOW`` for writing in two seconds."""

    protocol = "slow"

    def __init__(self, **options: Any) -> None:
        super().__init__(auto_mkdir=True, **options)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "wb" and f"rank-{SLOW:05d}" in path:
            time.sleep(2 * LEAST)
        return super()._open(path, mode, **options)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("slow://"))


def train_with_a_slow_store(argv: list[str]) -> int:
    """train.py with the protocol ``slow://``."""
    fsspec.register_implementation("slow", SlowDisk, clobber=True)
    return train.main(argv)


@pytest.mark.slow
def test_a_slow_disk_of_checkpoints_is_named_at_the_first_save(run_dir):
    run_dir.with_name("store").mkdir()
    folder = run_dir.with_name("store") / "checkpoints"
    store = f"--checkpoint-store=slow://{run_dir.with_name('store')}"
    with running(run_dir, "--save-every=20", store, main=train_with_a_slow_store) as ranks:
        until(ranks, "look at the disk")
    lines = re.findall(r"^warning: .*took.*$", ranks.output.read_text(), re.M)
    host = socket.gethostname()
    assert lines[0].startswith(f"warning: step-00000020: rank {SLOW} ({host}) took ")
    assert lines[0].endswith(f"under slow://{str(folder).lstrip('/')}")
    assert not [line for line in lines if f"rank {SLOW} " not in line]
