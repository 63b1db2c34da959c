"""One run to a directory: a lock that dies with its process.

Two jobs that write to the same directory would mix their metrics and delete each other's
checkpoints. So the process of rank 0 holds ``flock`` on ``run.lock`` from before its first write
until its end. The kernel releases the lock when the process dies, however it dies. The text of the
file (host, process, time of the start) is only for the message to a second job. A file that a
killed process leaves behind locks nothing.

The holder deletes the file at its end. Another process may have opened the file just before, and
then gets the lock of a file without a name. So after ``flock`` a process compares its file with the
file of that name, and begins again if the two differ.

Left out:

- Time limits. A lock that expires needs a clock that all hosts share, and a thread that renews it.
- File systems without ``flock``. The run then has one line of warning, and no lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import time
from datetime import UTC, datetime
from pathlib import Path

from dtron.errors import UserError
from dtron.json_files import is_there, read_bytes

LOCK = "run.lock"
HELD = (errno.EWOULDBLOCK, errno.EACCES)  # what flock reports if another process has the lock
POLL = 0.1  # seconds

_open: set[int] = set()  # the files of all locks of this process


def _leave_to_parent() -> None:
    """Close the files in a forked process. It shares the locks, and may outlive its parent."""
    while _open:
        os.close(_open.pop())


os.register_at_fork(after_in_child=_leave_to_parent)


class RunLock:
    """The lock of a run directory, held until ``release`` or the end of the process.

    ``warning``: why the directory could not be locked, in one line; None: it is locked."""

    def __init__(self, run_dir: Path, patience: float = 0.0):
        """Lock the directory. Raises UserError if another process holds the lock.

        ``patience``: the seconds to wait for a holder that is about to end."""
        self.warning: str | None = None
        self._path, until = run_dir / LOCK, time.monotonic() + patience
        while not self._lock():
            if time.monotonic() >= until:
                raise UserError(
                    f"--run-dir {run_dir}: another run is writing there ({self._holder}); wait for "
                    "its end, stop it, or choose another --run-dir"
                )
            time.sleep(POLL)
        self._write(_self())

    def release(self) -> None:
        if self._file in _open:
            with contextlib.suppress(OSError):
                self._path.unlink()
        self._close()

    def _lock(self) -> bool:
        """Return whether this process got the lock. Raises OSError for a file that cannot be
        opened."""
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _open.add(self._file)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                self._holder = _holder(self._file)
                self._close()
                return False
            self.warning = (
                f"warning: {self._path}: this file system has no locks ({error.strerror}); a "
                "second job in the same directory would go unnoticed"
            )
            return True
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._file), self._path.stat()):
                return True
        self._close()  # the holder before has deleted this file
        return self._lock()

    def _write(self, text: str) -> None:
        """Replace the text of the file. A full disk is no reason to refuse: the lock holds."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, text.encode(), 0)

    def _close(self) -> None:
        if self._file in _open:
            _open.remove(self._file)
            os.close(self._file)
        self._file = -1  # another file may get its number


def holder_lives(run_dir: Path) -> bool:
    """Whether a run seems to write to a directory. This neither opens nor tries the lock, which
    could refuse a run that begins. A holder on another host counts as alive. Raises UserError for a
    lock that is no readable file."""
    if not is_there(run_dir / LOCK):
        return False
    text = read_bytes(run_dir / LOCK).decode(errors="replace")
    found = re.match(r"host (.*), process (\d+), ", text)
    if found is None or found[1] != socket.gethostname():
        return True
    try:
        os.kill(int(found[2]), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's process
    return True


def _self() -> str:
    """Describe this process: host, process id, time of the start."""
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"host {socket.gethostname()}, process {os.getpid()}, since {now}"


def _holder(file: int) -> str:
    """Return the description of the process that holds the lock. The holder writes it directly
    after it got the lock, so a reader may have to wait."""
    for _ in range(10):
        text = os.pread(file, 200, 0).decode(errors="replace")
        if text:
            return " ".join("".join(c if c.isprintable() else " " for c in text).split())
        time.sleep(POLL)
    return "its host and process are unknown"
