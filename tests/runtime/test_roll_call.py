"""Ranks that are missing are named: at the start, and when a rank is lost."""

from __future__ import annotations

import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from dtron.errors import UserError
from dtron.runtime import roll_call
from dtron.runtime.roll_call import Address, Roll
from tests.helpers.ranks import Ranks
from tests.helpers.texts import one_line
from tests.helpers.train_cli import TINY

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.usefixtures("run_dir")]
HOST = socket.gethostname()


@pytest.fixture
def address():
    """Makes the address of a rank. Here all ranks are rolls of this process."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    yield lambda rank, size: Address("localhost", store.port, rank, size, "0", True)


@pytest.fixture
def present(address):
    """Makes rolls that have joined. They leave at the end: a roll that has answered would end this
    process."""
    made: list[Roll] = []

    def join(size: int) -> list[Roll]:
        rolls = joined(address, size)
        made.extend(rolls)
        return rolls

    yield join
    for roll in made:
        roll.leave()


def joined(address, size: int) -> list[Roll]:
    rolls = [Roll(address(rank, size)) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        list(pool.map(lambda roll: roll.join(timedelta(seconds=30)), rolls))
    return rolls


def test_a_rank_that_never_starts_is_named(address):
    with pytest.raises(UserError) as caught:
        Roll(address(0, 3)).join(timedelta(seconds=1))
    said = "1 of 3 ranks have started within 1 s; ranks 1, 2 are missing"
    assert str(caught.value).startswith(said) and "--timeout-seconds" in str(caught.value)


def test_a_store_that_is_gone_is_named():
    gone = Address("localhost", 1, 1, 2, "0", True)
    with pytest.raises(UserError, match="rank 1: cannot reach the store of the job at localhost:1"):
        Roll(gone).join(timedelta(seconds=1))


def test_the_ranks_that_do_not_answer_are_named(present, monkeypatch):
    monkeypatch.setattr(roll_call, "HANGS", 600)  # the answer of a test does not end the process
    answer = Roll._answer
    silent = lambda self: None if self._at.rank == 2 else answer(self)
    monkeypatch.setattr(Roll, "_answer", silent)
    rolls = present(4)
    want = f"no answer from rank 2 on host {HOST}"
    assert [rolls[rank].missing() for rank in (1, 0, 3)] == [want] * 3


def test_ranks_that_all_answer_are_not_blamed(present, monkeypatch):
    monkeypatch.setattr(roll_call, "HANGS", 600)
    rolls = present(2)
    assert [roll.missing() for roll in rolls] == ["every rank answers, so one of them hangs"] * 2


def test_a_job_that_is_over_has_no_thread_left(present):
    rolls = present(2)
    for roll in rolls:
        roll.leave()
        assert not roll._thread.is_alive()


@pytest.mark.parametrize("by_torchrun", [True, False])
def test_the_host_of_a_store_that_ends_is_named(by_torchrun):
    """Without torchrun rank 0 has the store, so the end of the store is the end of rank 0."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    roll = Roll(Address("localhost", store.port, 0, 1, "0", True))
    roll.join(timedelta(seconds=5))
    roll._at = replace(roll._at, hosted_by_torchrun=by_torchrun)
    del store
    who = "torchrun on host localhost" if by_torchrun else "no answer from rank 0 on host localhost"
    assert who in roll.missing()


def test_a_network_that_is_gone_is_no_hang(present, monkeypatch):
    """Then a call of the store neither returns nor fails."""
    monkeypatch.setattr(roll_call, "PATIENCE", 0.1)
    for_ever = threading.Event()
    rolls = present(2)
    monkeypatch.setattr(Roll, "_call", lambda self: for_ever.wait() or "")
    assert "no answer from rank 0 on host" in replaced(rolls[1]).missing()
    for_ever.set()


def replaced(roll: Roll) -> Roll:
    """As if rank 0 had the store."""
    roll._at = replace(roll._at, hosted_by_torchrun=False)
    return roll


@pytest.mark.parametrize("host", ["no host", "x" * 300, "no-such-host.invalid", "localhost"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_store_that_cannot_be_reached_is_one_line(host, rank, capfd):
    """torch would print a stack trace of thirty lines."""
    if (host, rank) == ("localhost", 0):
        return  # rank 0 would start the store there
    at = Address(host, 1, rank, 2, "0", False)
    one_line(
        lambda: Roll(at).join(timedelta(0)), f"rank {rank}: cannot reach the store", "MASTER_ADDR"
    )
    assert capfd.readouterr().err == ""


# ---- processes


def test_a_rank_alone_gets_one_line(run_dir):
    argv = [*TINY, "--mesh=dp=2", "--timeout-seconds=2", f"--run-dir={run_dir}"]
    rank = Ranks(argv, 1, run_dir.with_name("output.txt"), WORLD_SIZE="2")
    assert rank.codes(patience=120) == [2]
    said = rank.output.read_text()
    assert said.startswith("error: 1 of 2 ranks have started within 2 s; rank 1 is missing")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "mesh", ["dp=2", *(pytest.param(m, marks=pytest.mark.slow) for m in ("tp=2", "pp=2"))]
)
def test_a_frozen_rank_is_named_and_ends(run_dir, mesh):
    """Without SIGCONT the frozen rank would wait for the SIGKILL of its launcher."""
    model = ["--model.layers=2", "--steps=1000000", "--eval-every=0", "--timeout-seconds=5"]
    argv = [*TINY, *model, f"--mesh={mesh}", f"--run-dir={run_dir}"]
    ranks, log = Ranks(argv, 2, run_dir.with_name("output.txt")), run_dir / "metrics.jsonl"
    while not (log.exists() and log.stat().st_size > 0):
        assert not ranks.ended(0.01), ranks.output.read_text()
    os.kill(ranks.processes[1].pid, signal.SIGSTOP)
    assert ranks.codes(patience=60) == [2, 2], ranks.output.read_text()
    said = ranks.output.read_text()
    assert f"no answer from rank 1 on host {HOST}" in said and "Traceback" not in said
    lines = [line for line in said.splitlines() if "error: " in line]
    assert len(lines) == 2 and all(line.count("error: ") == 1 for line in lines)
