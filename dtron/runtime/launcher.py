"""The end of torchrun: a rank whose launcher is gone stops too.

torchrun starts each rank in a session of its own. So the death of torchrun (SIGKILL, a crash, the
out-of-memory killer) sends no signal to the ranks. They would train on, unknown to the scheduler,
and next to the job that is started in their place.

A thread compares the id of the parent process with the id at the start. Linux gives an orphan a new
parent.

- While a run trains, the ranks agree to stop at the next step, save, and end (``StopSignal``).
- If a run does not come to its next step, because it hangs, it ends without a save. The time limit
  is ``PATIENCE`` seconds plus three times the longest step.
- Before the first step, and in other commands, there is nothing to save. The process ends at once.

Only processes of torchrun do this. A program that a shell has started may outlive the shell
(``nohup``).

If torchrun dies within the first moments of Python, the parent at the start is the wrong one
already. Then the port of torchrun's store refuses connections.

A program between torchrun and the rank (``torchrun --no-python wrapper.sh``) hides the end of
torchrun: the wrapper lives on, and is the parent.

Left out: ``prctl(PR_SET_PDEATHSIG)``. Linux alone has it, and it sends its signal when the *thread*
ends that started the process.
"""

from __future__ import annotations

import os
import socket
import threading
import time

from dtron.runtime.output import complain

POLL = 0.5  # seconds
PATIENCE = 30.0  # seconds
REACH = 5.0  # seconds to reach the store

# This module is imported before torch. Seconds later the parent may be another one already.
_parent_at_import = os.getpid(), os.getppid()


class LauncherWatch:
    """Watches the process that started this one."""

    def __init__(self, poll: float = POLL, patience: float = PATIENCE) -> None:
        pid, parent = _parent_at_import
        self._parent = parent if pid == os.getpid() else os.getppid()  # or this one was forked
        self._poll, self._patience = poll, patience
        self._gone = threading.Event()
        self._trained = False  # whether there may be something to save
        self._asked_at: float | None = None  # the last call of ``gone``; None: no step follows
        self._longest = 0.0  # seconds between two calls of ``gone``

    def start(self) -> None:
        threading.Thread(target=self._watch, name="launcher", daemon=True).start()

    def gone(self) -> bool:
        """Return whether the launcher is gone. A run calls this between its steps."""
        now = time.monotonic()
        if self._asked_at is not None:
            self._longest = max(self._longest, now - self._asked_at)
        self._asked_at, self._trained = now, True
        return self._gone.is_set()

    def training_is_over(self) -> None:
        """Note that no step follows. The run saves and ends by itself."""
        self._asked_at = None

    def _watch(self) -> None:
        if not _store_refuses():
            while os.getppid() == self._parent:
                time.sleep(self._poll)
        self._gone.set()
        noticed = time.monotonic()
        while True:
            if not self._trained:
                self._exit("there is nothing to save")
            if self._asked_at is not None:
                late = time.monotonic() - max(self._asked_at, noticed)
                if late > self._patience + 3 * self._longest:
                    self._exit(f"no step has ended for {late:.0f} s, so nothing was saved")
            time.sleep(self._poll)

    def _exit(self, why: str) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one line from each host
            complain(f"stopped: torchrun has ended; {why}")
        os._exit(143)


def _store_refuses() -> bool:
    """Whether the store that torchrun started before this process is gone."""
    environment = os.environ
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    try:
        address = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        socket.create_connection(address, timeout=REACH).close()
    except ConnectionRefusedError:
        return True
    except (KeyError, ValueError, OSError):
        return False  # nothing is known, for example because the host of the store is busy
    return False


watch: LauncherWatch | None = None  # of this process; None: torchrun has not started it


def watch_launcher() -> None:
    """Begin to watch torchrun, if torchrun has started this process."""
    global watch
    if watch is None and "TORCHELASTIC_RUN_ID" in os.environ:
        watch = LauncherWatch()
        watch.start()
