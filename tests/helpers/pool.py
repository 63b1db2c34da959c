"""A pool of long-lived gloo processes: tests on real ranks start processes once.

Each process is a fork of a process that has imported everything (helpers/ranks.py). A job is a
module-level function ``job(*args)``. Every rank runs it with the same arguments inside one process
group, and the results come back in rank order. A job that raises on any rank raises here, with its
traceback."""

from __future__ import annotations

import os
import queue
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from dtron.runtime.launch import keep_memory
from tests.helpers.collect import collect_seldom
from tests.helpers.ranks import context

RANKS = 4
PATIENCE = 180  # seconds for one job before the pool counts as hung


class Pool:
    def __init__(self, folder: Path, ranks: int = RANKS):
        self._ranks = ranks
        with mock.patch.dict(
            os.environ, {"PYTHONPATH": os.pathsep.join(sys.path)}
        ):  # see helpers/ranks.py
            context.set_forkserver_preload(["tests.helpers.ranks", "tests.helpers.warm_compiler"])
            forkserver.ensure_running()
        self._inbox = [context.Queue() for _ in range(ranks)]
        self._outbox = context.Queue()
        store = str(folder / "store")
        self._processes = [
            context.Process(
                target=_work,
                args=(r, ranks, store, self._inbox[r], self._outbox),
                daemon=True,
            )
            for r in range(ranks)
        ]
        for process in self._processes:
            process.start()
        self._jobs = 0

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        self._jobs += 1
        for inbox in self._inbox:
            inbox.put((self._jobs, job, args))
        results: dict[int, Any] = {}
        while len(results) < self._ranks:
            try:
                number, rank, ok, value = self._outbox.get(timeout=PATIENCE)
            except queue.Empty:
                raise AssertionError(
                    f"ranks {set(range(self._ranks)) - set(results)} hang in {job.__name__}{args}"
                ) from None
            if number < self._jobs:  # of a job that has already failed
                continue
            assert ok, f"rank {rank} failed in {job.__name__}:\n{value}"
            results[rank] = value
        return [results[r] for r in range(self._ranks)]

    def close(self) -> None:
        for inbox in self._inbox:
            inbox.put(None)
        for process in self._processes:
            process.join(timeout=20)
            process.kill()


def _work(rank: int, ranks: int, store: str, inbox, outbox) -> None:
    torch.set_num_threads(1)
    keep_memory()
    collect_seldom()
    dist.init_process_group(
        "gloo",
        rank=rank,
        world_size=ranks,
        store=dist.FileStore(store, ranks),
        timeout=timedelta(seconds=60),
    )
    while (item := inbox.get()) is not None:
        number, job, args = item
        try:
            outbox.put((number, rank, True, job(*args)))
        except BaseException:
            outbox.put((number, rank, False, traceback.format_exc()))
    dist.destroy_process_group()
    outbox.close()
    outbox.join_thread()
    os._exit(0)  # Python's own shutdown takes a second with torch
