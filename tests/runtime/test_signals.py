"""Ctrl-C at any moment is one line; a terminal that closes stops no run that nohup has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from dtron.runtime import signals
from dtron.runtime.signals import StopSignal, allow_interrupts, stop_at_once
from tests.helpers.paths import ROOT

COMMANDS = ("verify", "generate", "show", "hf", "fp8")

# The programs wait in short sleeps: a signal that arrives just before a sleep does not end it.
# A library in the middle of its import, which hides the interrupt from the program.
TORCH = """
import sys, time
print("ready", flush=True)
try:
    for _ in range(6000):
        time.sleep(0.1)
except BaseException as error:
    raise ImportError("the library is broken") from error
"""
IN_MAIN = """
import sys, time
from dtron.runtime.exit import before_imports, run_cli
before_imports()
def main(argv):
    print("ready", flush=True)
    for _ in range(6000):
        time.sleep(0.1)
sys.exit(run_cli(main, []))
"""
FORKED = """
import os, sys, time
from dtron.runtime.exit import before_imports
before_imports()
read, write = os.pipe()
if os.fork() == 0:
    os.close(read)
    os.write(write, b"x")
else:
    os.read(read, 1)
    print("ready", flush=True)
for _ in range(6000):
    time.sleep(0.1)
"""


def interrupted(*command: str, **more: str) -> tuple[int, str]:
    """Start a program, press Ctrl-C when it has printed "ready", and return its exit code and what
    it prints then."""
    process = subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, **more},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with process.stdout as pipe:
        assert pipe.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGINT)  # a terminal interrupts all processes
        said = pipe.read()
    return process.wait(60), said


@pytest.fixture
def imports(tmp_path: Path) -> str:
    """A path on which torch never ends its import."""
    (tmp_path / "torch.py").write_text(TORCH)
    return str(tmp_path)


@pytest.mark.parametrize(
    "command",
    [["train.py"], ["-m", "dtron", "train"], *(["-m", f"dtron.{name}"] for name in COMMANDS)],
)
def test_ctrl_c_during_the_imports_is_one_line(imports, command):
    assert interrupted(*command, PYTHONPATH=imports) == (130, "stopped\n")


@pytest.mark.parametrize("program", [IN_MAIN, FORKED])
def test_ctrl_c_before_the_training_is_one_line(program):
    assert interrupted("-c", program) == (130, "stopped\n")


def test_an_ignored_interrupt_stays_ignored():
    """A shell lets background jobs of a script ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stop_at_once()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop_at_once()
        assert signal.getsignal(signal.SIGINT) != signal.default_int_handler
        allow_interrupts()
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_of_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.asked()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.asked() and stop.name == "SIGHUP"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_that_was_ended_before_its_first_step_makes_none(monkeypatch):
    """torchrun ends a job that prepares its data: no step is made, and lost, in the time left."""
    monkeypatch.setattr(signals.threading, "Timer", Mock())
    monkeypatch.setattr(signals, "_termination", None)
    before = signal.getsignal(signal.SIGTERM)
    try:
        signals.Termination().install()
        with StopSignal() as stop:
            assert not stop.asked()
        os.kill(os.getpid(), signal.SIGTERM)
        with StopSignal() as stop:
            assert stop.asked() and stop.name == "SIGTERM"
    finally:
        signal.signal(signal.SIGTERM, before)
