"""One run to a directory: a second job is refused, a dead job is no obstacle."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from dtron.checkpoint import files
from dtron.errors import UserError
from dtron.runtime import run_lock
from dtron.runtime.exit import run_cli
from dtron.runtime.run_lock import LOCK, RunLock
from tests.helpers.paths import ROOT
from tests.helpers.train_cli import MANY, SIX, TINY, records, refused, run

PROGRAM = """
import os, sys, time
from pathlib import Path
from dtron.runtime.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
if sys.argv[2] == "forks" and os.fork() == 0:
    print("ready", os.getpid(), flush=True)
elif sys.argv[2] == "forks":
    time.sleep(600)
else:
    print("ready", os.getpid(), flush=True)
time.sleep(600)
"""


@contextmanager
def holder(run_dir: Path, kind: str = "alone") -> Iterator[tuple[subprocess.Popen, int]]:
    """Another process that holds the lock, and the id that it prints: its own or its child's."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(run_dir), kind],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process, int(process.stdout.readline().split()[1])
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def content(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_second_job_is_refused_and_a_killed_one_is_no_obstacle(tmp_path):
    with holder(tmp_path) as (process, pid):
        with pytest.raises(UserError) as caught:
            RunLock(tmp_path)
        where = rf"host {socket.gethostname()}, process {pid}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:"
        assert re.search(where, str(caught.value)) and "--run-dir" in str(caught.value)
        process.kill()
        process.wait()
        assert str(pid) in (tmp_path / LOCK).read_text()  # it could not tidy up
        lock = RunLock(tmp_path)
        assert f"process {os.getpid()}" in (tmp_path / LOCK).read_text()
        lock.release()


def test_a_forked_process_does_not_keep_the_lock(tmp_path):
    with holder(tmp_path, "forks") as (process, child):
        assert child != process.pid
        process.kill()
        process.wait()
        os.kill(child, 0)  # the child lives
        RunLock(tmp_path).release()


def test_a_file_that_its_holder_deletes_locks_nothing(tmp_path, monkeypatch):
    """Another process opens the file, then the holder ends, then the other process locks it."""
    before, flock = RunLock(tmp_path), fcntl.flock

    def late(file, how):
        before.release()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    lock = RunLock(tmp_path)
    monkeypatch.undo()
    with pytest.raises(UserError, match="another run"):
        RunLock(tmp_path)
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_train_refuses_a_directory_in_use_and_changes_nothing(run_dir, capsys):
    run(run_dir, *SIX)
    lock = RunLock(run_dir)
    before = content(run_dir)
    for argv in ([], ["--resume"], ["--resume=auto"], MANY, ["--resume", "--steps=8", *MANY]):
        message = refused(capsys, f"--run-dir={run_dir}", *argv)
        assert f"process {os.getpid()}" in message and "another run" in message
    assert content(run_dir) == before
    lock.release()
    assert len(run(run_dir, "--resume", "--steps=8")) == 8


def test_a_run_gives_the_lock_back_however_it_ends(run_dir, capsys):
    run(run_dir, *SIX)
    assert not (run_dir / LOCK).exists()
    refused(capsys, f"--run-dir={run_dir}", "--resume", "--seed=1")
    refused(capsys, f"--run-dir={run_dir}", "--data.path=gone.txt")
    assert not (run_dir / LOCK).exists()


def test_a_restarted_process_waits_for_the_one_before(run_dir, monkeypatch):
    run(run_dir, *SIX, "--steps=2")
    before, waits = RunLock(run_dir), []
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    sleep = lambda _: waits.append(1) or before.release()
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=sleep)
    monkeypatch.setattr(run_lock, "time", clock)
    assert len(run(run_dir, *SIX)) == 6 and len(waits) == 1


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(run_dir, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert len(run(run_dir)) == 4
    out = capsys.readouterr().out
    assert out.count("warning: ") == 1 and f"no locks ({os.strerror(number)})" in out


# ---- jobs of torchrun

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def start(program: str, *argv: str, launch: list[str] = LAUNCH, **more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*launch, str(ROOT / program), *TINY, "--mesh=dp=2", *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1", **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_of_two_jobs_that_start_together_one_trains(run_dir):
    argv = ["--save-every=2", "--steps=100", f"--run-dir={run_dir}", "--sample-tokens=0"]
    jobs = [start("train.py", *argv) for _ in range(2)]
    said = [job.communicate(timeout=300) for job in jobs]
    codes = [job.returncode for job in jobs]
    assert sorted(map(bool, codes)) == [False, True], said
    loser = said[0 if codes[0] else 1][1]
    assert loser.count("error: --run-dir") == 1 and "another run is writing there" in loser
    assert [record["step"] for record in records(run_dir)] == list(range(1, 101))
    assert len(files.whole(run_dir)) == 50


@pytest.mark.slow
def test_a_job_that_torchrun_restarts_does_not_lock_itself_out(run_dir):
    argv = ["--save-every=1", "--steps=20", f"--run-dir={run_dir}", "--sample-tokens=0"]
    launch = [*LAUNCH, "--max-restarts=1"]
    job = start("tests/helpers/dying.py", *argv, launch=launch, DIES="0", HOW="leaves")
    out, err = job.communicate(timeout=300)
    assert job.returncode == 0, err
    assert "resumed at step" in out and "another run" not in err
    assert [record["step"] for record in records(run_dir)] == list(range(1, 21))
    assert run_cli(train.main, [f"--run-dir={run_dir}", "--resume=auto", "--simulate"]) == 0
