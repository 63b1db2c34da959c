"""train.py on processes that can be killed, each forked from a process that has imported
everything.

torchrun does not fit: it gives its children sessions of their own, so a kill of torchrun leaves
them alive. It also takes seconds to start, mostly for imports."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection, forkserver
from pathlib import Path
from unittest import mock

import torch
from torch.distributed import TCPStore

import train
from dtron.runtime.exit import run_cli
from tests.helpers.paths import ROOT

PASSED_ON = ("DTRON_CACHE",)

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.helpers.ranks"])


class Ranks:
    """A run of ``n`` ranks, started by the constructor.

    ``output``: the file for stdout and stderr of all ranks.
    ``main``: the program, a module-level function.
    ``more``: environment variables."""

    def __init__(
        self, argv: Sequence[str], n: int, output: Path, main: Callable = train.main, **more: str
    ):
        self.output = output
        output.write_text("")
        self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        shared = {
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(self._store.port),
            "WORLD_SIZE": str(n),
        }
        shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_WORLD_SIZE": str(n)}
        shared |= {name: os.environ[name] for name in PASSED_ON if name in os.environ} | more
        own = lambda r: shared | {"RANK": str(r), "LOCAL_RANK": str(r)}
        args = lambda r: (main, list(argv), own(r), os.getcwd(), str(output))
        self.processes = [
            context.Process(target=_rank, args=args(r), daemon=True) for r in range(n)
        ]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        with mock.patch.dict(
            os.environ, {"PYTHONPATH": path}
        ):  # before Python 3.12 the server takes its path from here
            forkserver.ensure_running()
        for process in self.processes:
            process.start()

    def ended(self, seconds: float) -> bool:
        """Whether rank 0 ends within this time."""
        self.processes[0].join(seconds)
        return self.processes[0].exitcode is not None

    def kill(self, which: Sequence[int]) -> None:
        for r in which:
            self.processes[r].kill()

    def codes(self, patience: float = 600.0) -> list[int | None]:
        """Wait for the exit code of each rank. None: the rank did not end, and is killed."""
        for process in self.processes:
            process.join(patience)
        found = [process.exitcode for process in self.processes]
        self.kill(range(len(found)))
        return found

    def together(self, patience: float = 300.0) -> list[int | None]:
        """Wait for the exit codes. When a rank fails, terminate the others, as torchrun does."""
        left, until = list(self.processes), time.monotonic() + patience
        while left and connection.wait([p.sentinel for p in left], until - time.monotonic()):
            ended = [p for p in left if p.exitcode is not None]
            left = [p for p in left if p not in ended]
            if any(p.exitcode for p in ended):
                for process in left:
                    process.terminate()
        return self.codes(max(0.0, until - time.monotonic()))


def _rank(
    main: Callable, argv: list[str], environment: dict[str, str], folder: str, output: str
) -> None:
    said = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ |= environment
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.exit(run_cli(main, argv))
