"""A rank whose launcher is gone saves, says so and ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dtron.checkpoint import files
from dtron.runtime import launcher
from dtron.runtime.launcher import LauncherWatch, watch_launcher
from dtron.runtime.signals import LAUNCHER, StopSignal
from tests.helpers.paths import ROOT
from tests.helpers.train_cli import SIX, TINY, records, run

# A launcher: starts a program in a session of its own, as torchrun does, and sleeps.
PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True)
time.sleep(600)
"""
IN_START = """
import time
from dtron.runtime.exit import run_cli
def main(argv):
    print("ready", flush=True)
    time.sleep(600)
run_cli(main, [])
"""
IN_STEP = """
import time
from dtron.runtime.launcher import LauncherWatch
watch = LauncherWatch(poll=0.01, patience=0.1)
watch.start()
watch.gone()
print("ready", flush=True)
time.sleep(600)
"""


def end_of_orphan(program: str, **more: str) -> str:
    """Start a program below a launcher, kill the launcher, wait for the end of the program, and
    return what the program has printed. Its end closes the pipe."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, program],
        env={**os.environ, "TORCHELASTIC_RUN_ID": "x", **more},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    parent.wait()
    with parent.stdout as pipe:
        return pipe.read()


def test_a_rank_that_has_nothing_to_save_ends_at_once():
    said = end_of_orphan(IN_START)
    assert said.startswith("stopped: torchrun has ended; ") and said.count("\n") == 1
    assert "nothing to save" in said
    assert end_of_orphan(IN_START, LOCAL_RANK="1") == ""  # one line from each host


def test_a_rank_that_hangs_in_a_step_ends():
    said = end_of_orphan(IN_STEP)
    assert "no step has ended" in said and said.count("\n") == 1


def test_a_run_saves_and_says_so(run_dir, monkeypatch, capsys):
    run(run_dir.with_name("whole"), *SIX)
    calls = []
    gone = lambda: calls.append(1) or len(calls) > 3
    watch = SimpleNamespace(gone=gone, training_is_over=lambda: None)
    monkeypatch.setattr(launcher, "watch", watch)
    assert len(run(run_dir, *SIX, "--save-every=0", code=1)) == 3
    assert f"stopped by {LAUNCHER} after step 3; go on with --resume" in capsys.readouterr().out
    monkeypatch.setattr(launcher, "watch", None)
    found = run(run_dir, *SIX, "--resume")
    assert [r["loss"] for r in found] == [r["loss"] for r in records(run_dir.with_name("whole"))]


def test_a_launcher_that_is_gone_from_the_start_is_noticed(monkeypatch):
    """Python takes a while to come to the first line of a program. Then the parent is another."""
    with socket.create_server(("localhost", 0)) as store:
        port = store.getsockname()[1]
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", str(port))
        assert not launcher._store_refuses()
    assert launcher._store_refuses()
    more = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    done = subprocess.run(
        [sys.executable, "-c", IN_START],
        env={**os.environ, "TORCHELASTIC_RUN_ID": "x", **more},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 143 and "torchrun has ended" in done.stderr


def stop_on_pool(lost: int) -> tuple[bool, str]:
    """A job for the pool: the launcher of one rank is gone."""
    import torch.distributed as dist

    with StopSignal(dist.group.WORLD) as stop, pytest.MonkeyPatch.context() as patch:
        gone = lambda: dist.get_rank() == lost
        watch = SimpleNamespace(gone=gone, training_is_over=lambda: None)
        patch.setattr(launcher, "watch", watch)
        return stop.asked(), stop.name


@pytest.mark.xdist_group("pool")
def test_the_ranks_of_all_hosts_agree_to_stop(pool):
    assert pool.run(stop_on_pool, 1) == [(True, LAUNCHER)] * 4


def test_a_run_that_lost_a_launcher_is_not_over():
    """The torchruns of other nodes start it again, if it ends with an error."""
    stop = StopSignal()
    codes = {}
    for stop.name in ("", "SIGTERM", LAUNCHER):
        codes[stop.name] = stop.exit_code
    assert codes == {"": 0, "SIGTERM": 0, LAUNCHER: 1}


def test_only_torchrun_is_watched(monkeypatch):
    """A program that a shell has started outlives the shell."""
    monkeypatch.setattr(launcher, "watch", None)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    watch_launcher()
    assert launcher.watch is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    watch_launcher()
    assert isinstance(launcher.watch, LauncherWatch) and not launcher.watch.gone()
    launcher.watch.training_is_over()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["start", "step"])
def test_ranks_of_a_killed_torchrun_end(run_dir, moment):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    argv = [*TINY, "--mesh=dp=2", "--steps=1000000", "--eval-every=0", f"--run-dir={run_dir}"]
    job = subprocess.Popen(
        [*launch, str(ROOT / "train.py"), *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log = run_dir / "metrics.jsonl"
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    begun = {
        "start": lambda: len(children.read_text().split()) == 2,
        "step": lambda: log.exists() and log.stat().st_size > 0,
    }
    while not begun[moment]():
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    said, _ = job.communicate(timeout=120)  # the pipe is open until both ranks have ended
    if moment == "start":
        assert said.count("nothing to save") <= 1 and not log.exists(), said
    else:
        assert said.count(f"stopped by {LAUNCHER} after step ") == 1, said
        assert records(run_dir)[-1]["step"] == int(files.newest(run_dir).name[5:])
    assert "Traceback" not in said
