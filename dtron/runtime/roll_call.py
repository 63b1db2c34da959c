"""The roll call of ranks: who is missing, at the start and when a rank is lost.

An error of a collective says that *some* rank is lost. It names the address of a neighbour at best,
and the neighbour may be healthy. So the ranks answer a roll call. It uses the store of torchrun
(or of rank 0), through which the process groups find each other too.

1. Each rank enters its host and its process id before the first process group is made
   (``Roll.join``). A rank that never starts is missing there, and the others name it.
2. A thread of each rank waits for a key of its own. Waiting costs nothing: no message is sent.
3. A rank whose collective has failed sets the keys of all ranks (``Roll.missing``). Every thread
   answers, also if its main thread is in the middle of a long step. A rank that is dead or frozen
   cannot answer.
4. After the answer the job is over. A rank whose main thread hangs is ended by its thread.

A frozen rank (SIGSTOP) cannot act on the SIGTERM of torchrun, which then waits 30 seconds for its
SIGKILL. So a rank of the same host that calls the roll sends SIGCONT to the missing processes.

Left out: heartbeats. They cost messages while everything is well, and a time limit that is right
for no step.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from dtron.errors import UserError

ANSWER = 1.5  # seconds; an answer takes milliseconds, and GRACE (runtime/signals.py) is longer
REACH = 3.0  # seconds to reach the store when a rank is lost; its host may be lost too
PATIENCE = 8.0  # seconds for a whole roll call
HANGS = 10.0  # seconds after an answer in which the main thread must end the process
POLL = 0.05  # seconds
FOREVER = timedelta(days=365)


@dataclass(frozen=True)
class Address:
    """The address of the store, and the place of this process: from the variables of torchrun."""

    host: str
    port: int
    rank: int
    size: int
    attempt: str
    hosted_by_torchrun: bool

    @classmethod
    def of_this_process(cls) -> Address:
        of = os.environ
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            if not of.get(name):
                raise UserError(
                    f"{name}: is not set, and each of several processes needs it; start them with "
                    "torchrun"
                )
        agent = of.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(
            of["MASTER_ADDR"],
            int(of["MASTER_PORT"]),
            int(of["RANK"]),
            int(of["WORLD_SIZE"]),
            # Rank 0's own store is new in each attempt. Then the counts may differ: that of a spare
            # node begins at 0.
            of.get("TORCHELASTIC_RESTART_COUNT", "0") if agent else "0",
            agent,
        )

    def connect(self, timeout: timedelta, first: bool = False) -> dist.Store:
        """Return a connection to the store. A connection serves one thread: while one call waits,
        no other call of the same connection runs.

        ``first``: the connection of the process groups. Rank 0 then starts the store, if torchrun
            has none."""
        store = dist.TCPStore(
            self.host,
            self.port,
            is_master=first and self.rank == 0 and not self.hosted_by_torchrun,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
        )
        return dist.PrefixStore(f"dtron/{self.attempt}", store)


class Roll:
    """The roll of a job with several processes."""

    def __init__(self, address: Address) -> None:
        self._at = address
        self._thread = threading.Thread(target=self._answer, name="roll call", daemon=True)
        self._over = threading.Event()
        self._store: dist.Store

    def join(self, timeout: timedelta) -> dist.Store:
        """Enter this rank, and wait for the others. Return the store for ``init_process_group``.

        Raises UserError that names the ranks that are missing after ``timeout``."""
        at, seconds = self._at, int(timeout.total_seconds())
        remedy = f"start them, or raise --timeout-seconds {seconds}"
        try:
            _reach(at, seconds)
            store = at.connect(timeout, first=True)
            store.set(f"rank/{at.rank}", json.dumps([socket.gethostname(), os.getpid()]))
            if store.add("present", 1) == at.size:
                store.set("all", "1")
            late = [] if _appears(store, "all", seconds) else self._absent(store, "rank")
        except (dist.DistError, OSError, UnicodeError) as error:
            raise UserError(
                f"rank {at.rank}: cannot reach the store of the job at {at.host}:{at.port} "
                f"({_first_line(error)}); check MASTER_ADDR and MASTER_PORT, or {remedy}"
            ) from error
        if late:
            raise UserError(
                f"{at.size - len(late)} of {at.size} ranks have started within {seconds} s; "
                f"{_numbers(late)} missing; see their output, {remedy}"
            )
        self._store = store
        self._thread.start()
        return store

    def leave(self) -> None:
        """End the thread of this rank: the run is over."""
        self._over.set()
        if self._store_lives():
            with contextlib.suppress(dist.DistError):  # rank 0 may have ended, and its store too
                self._store.set(f"call/{self._at.rank}", "over")
            self._thread.join(REACH)

    def _store_lives(self) -> bool:
        """Whether the store answered so far. Its end ends the thread."""
        return self._thread.is_alive()

    def missing(self) -> str:
        """Call the roll. Return the ranks that do not answer, with their hosts. All ranks call it
        at about the same time, and get the same text."""
        if not self._store_lives():
            return self._lost_store()
        # A network that is gone answers nothing, not even an error, and no call of a store that
        # sends has a timeout then.
        found: list[str] = []
        call = threading.Thread(target=lambda: found.append(self._call()), daemon=True)
        call.start()
        call.join(PATIENCE)
        return found[0] if found else self._lost_store()

    def _call(self) -> str:
        """See ``missing``. Waits for ever if the network is gone."""
        store = self._store
        try:
            store.set_timeout(timedelta(seconds=REACH))
            if store.compare_set("caller", "", str(self._at.rank)) != str(self._at.rank).encode():
                found = _appears(store, "missing", ANSWER + 1)
                return self._describe(store, json.loads(store.get("missing"))) if found else ""
            for rank in range(self._at.size):
                store.set(f"call/{rank}", "lost")
            until = time.monotonic() + ANSWER
            while (absent := self._absent(store, "answer")) and time.monotonic() < until:
                time.sleep(POLL)
            store.set("missing", json.dumps(absent))
            return self._describe(store, absent)
        except dist.DistError:
            return self._lost_store()

    def _lost_store(self) -> str:
        """Name the host of a store that has ended."""
        where = f"on host {self._at.host}"
        if self._at.hosted_by_torchrun:
            return f"torchrun {where}, which has the store of the job, has ended"
        return f"no answer from rank 0 {where}, which has the store of the job"

    def _describe(self, store: dist.Store, absent: list[int]) -> str:
        """Return the missing ranks as text, and wake those of this host that are frozen."""
        if not absent:
            return "every rank answers, so one of them hangs"
        found = [json.loads(store.get(f"rank/{rank}")) for rank in absent]
        for host, process in found:
            if host == socket.gethostname():
                with contextlib.suppress(OSError):
                    os.kill(process, signal.SIGCONT)
        hosts = [f"rank {r} on host {host}" for r, (host, _) in zip(absent, found, strict=True)]
        more = f" and {len(hosts) - 8} more" if len(hosts) > 8 else ""
        return f"no answer from {', '.join(hosts[:8])}{more}"

    def _absent(self, store: dist.Store, kind: str) -> list[int]:
        return [rank for rank in range(self._at.size) if not store.check([f"{kind}/{rank}"])]

    def _answer(self) -> None:
        """Answer a roll call. Then end this process, if its main thread does not."""
        try:
            store = self._at.connect(timedelta(seconds=REACH))
            store.wait([f"call/{self._at.rank}"], FOREVER)
            if store.get(f"call/{self._at.rank}") != b"lost":
                return
            store.set(f"answer/{self._at.rank}", "1")
        except dist.DistError:  # the store has ended: torchrun is gone
            return
        if not self._over.wait(HANGS):
            os._exit(2)


def _reach(address: Address, seconds: float) -> None:
    """Wait until the store can be reached. Raises OSError when the time is over: ``TCPStore`` would
    print a C++ stack trace. A name of a host may be known late."""
    until = time.monotonic() + seconds
    while True:
        try:
            if address.rank == 0 and not address.hosted_by_torchrun:  # starts the store itself
                socket.getaddrinfo(address.host, address.port)
            else:
                socket.create_connection((address.host, address.port), max(seconds, 1.0)).close()
            return
        except OSError:
            if time.monotonic() >= until:
                raise
        time.sleep(0.2)


def _appears(store: dist.Store, key: str, seconds: float) -> bool:
    """Wait for a key. ``Store.wait`` would print a C++ stack trace when the time is over."""
    until, pause = time.monotonic() + seconds, POLL
    while not store.check([key]):
        left = until - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(pause, left))
        pause = min(1.5 * pause, 0.5)  # thousands of ranks ask the same store
    return True


def _numbers(ranks: list[int]) -> str:
    text = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if ranks[8:] else "")
    return f"rank {text} is" if len(ranks) == 1 else f"ranks {text} are"


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]


roll: Roll | None = None  # of this process; None: it has not started several ranks


def join_job(timeout: timedelta) -> dist.Store:
    """Enter the roll of the job that the variables of torchrun describe."""
    global roll
    roll = Roll(Address.of_this_process())
    return roll.join(timeout)


def leave_job() -> None:
    """Leave the roll after the last collective of the job."""
    global roll
    if roll is not None:
        roll.leave()
    roll = None


def missing_ranks() -> str:
    """Call the roll of this job. Return the ranks that do not answer; empty without a roll."""
    return roll.missing() if roll is not None else ""
