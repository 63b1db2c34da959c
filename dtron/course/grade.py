"""Grading of many submissions: every lab of every folder in a process of its own, with limits of
time and memory.

The processes are forked from this one, which has imported torch and has simulated a mesh once. So a
check starts at once. The limits end an endless loop and a tensor that is too large. They are no
protection against code that attacks the check or the machine: run the command in a container for
files of strangers.

The results do not depend on the number of processes: they are in the order of the folders, and have
no times. (Linux enforces the limit of memory on all memory of a process, macOS only on a part.)
"""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch

from dtron.course.lab import Lab, LabResult, check_lab, failed
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import simulated
from dtron.mesh import Layout


@dataclass(frozen=True)
class Limits:
    """Limits of one lab of one submission.

    ``seconds``: of CPU. A process that sleeps ends after ``PATIENCE`` times as long.
    ``memory``: bytes of data that the process may allocate, and bytes of a file that it writes."""

    seconds: int = 60
    memory: int = 4 << 30


PATIENCE = 10
LOOK_EVERY = 0.5  # seconds between looks for processes that have ended without a result


@dataclass(frozen=True)
class Grade:
    """The results of a submission: one for each lab."""

    folder: str
    labs: tuple[LabResult, ...]

    @property
    def points(self) -> int:
        return sum(r.points for r in self.labs)

    @property
    def of(self) -> int:
        return sum(r.of for r in self.labs)


@dataclass(frozen=True)
class _Running:
    process: ForkProcess
    deadline: float


def grade(
    folders: Sequence[Path], labs: Sequence[Lab], jobs: int, limits: Limits
) -> tuple[Grade, ...]:
    """Grade submissions, ``jobs`` at a time."""
    _warm_up()
    todo = [(folder, lab) for folder in folders for lab in labs]
    results = dict(_results(todo, jobs, limits))
    by_folder = (
        tuple(results[i * len(labs) + j] for j in range(len(labs))) for i in range(len(folders))
    )
    return tuple(Grade(str(f), r) for f, r in zip(folders, by_folder, strict=True))


def _warm_up() -> None:
    """Simulate a mesh, because the first time takes half a second and each check has a process of
    its own. No backward: torch refuses a backward in a fork of a process that has run one on a
    GPU."""
    with simulated(MeshShape(dp=2)) as mesh, torch.no_grad():
        layout = Layout(mesh)
        x_TD = layout.shard(torch.ones(4, 4), "tokens_sp", "act_embed")
        _ = layout.constrain(x_TD, "tokens", "act_embed") @ x_TD


def _results(
    todo: Sequence[tuple[Path, Lab]], jobs: int, limits: Limits
) -> Iterator[tuple[int, LabResult]]:
    waiting = list(enumerate(todo))[::-1]
    running: dict[Connection, tuple[int, _Running]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                i, (folder, lab) = waiting.pop()
                receiver, process = _begin(folder, lab, limits)
                deadline = time.monotonic() + PATIENCE * limits.seconds
                running[receiver] = i, _Running(process, deadline)
            done: list[Any] = wait(list(running), timeout=LOOK_EVERY)
            # A process that a submission has forked keeps the connection open after the check.
            ended = [c for c, (_, r) in running.items() if not r.process.is_alive()]
            late = [c for c, (_, r) in running.items() if r.deadline <= time.monotonic()]
            for receiver in dict.fromkeys((*done, *ended, *late)):
                i, run = running.pop(receiver)
                yield i, _end(receiver, run.process, todo[i][1], limits)
    finally:
        for receiver, (_, run) in running.items():
            _kill(run.process)
            receiver.close()


def _begin(folder: Path, lab: Lab, limits: Limits) -> tuple[Connection, ForkProcess]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_check, args=(folder, lab, limits, sender), daemon=True)
    process.start()
    sender.close()
    return receiver, process


def _check(folder: Path, lab: Lab, limits: Limits, sender: Connection) -> None:
    os.setsid()  # so that the processes of a submission end with it
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    sys.stdout = sys.stderr = os.fdopen(null, "w")
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_DATA, limits.memory)
    _limit(resource.RLIMIT_CPU, limits.seconds)
    _limit(resource.RLIMIT_FSIZE, limits.memory)
    random.seed(0)  # a file that draws numbers has the same result every time
    torch.manual_seed(0)
    try:
        result = check_lab(lab, folder)
    except MemoryError:
        result = failed(lab, "out of memory")
    sender.send(result)


def _limit(kind: int, most: int) -> None:
    """Set a limit of this process, but not above the limit that it has."""
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def _end(receiver: Connection, process: ForkProcess, lab: Lab, limits: Limits) -> LabResult:
    """Return the result of a process. If there is none, say why."""
    late = not receiver.poll() and process.is_alive()
    try:
        result: LabResult | None = receiver.recv() if receiver.poll() else None
    except (EOFError, OSError):
        result = None
    receiver.close()
    if result is None and not late:
        process.join()
    code = process.exitcode
    _kill(process)
    if late:
        return failed(lab, f"no result in {PATIENCE * limits.seconds} seconds; does it wait?")
    return failed(lab, _cause(code, limits)) if result is None else result


def _cause(code: int | None, limits: Limits) -> str:
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"more than {limits.seconds} seconds of CPU; is there an endless loop?"
    return f"the process has ended before the check (exit code {code})"


def _kill(process: ForkProcess) -> None:
    """End a process and what it has started."""
    if process.pid is not None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            process.kill()  # it has not made its group yet, or has ended
    process.join()
