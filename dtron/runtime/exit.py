"""Exit handling of every command. An error that the user can fix is one line on stderr. No rank is
left hanging. (Signals: runtime/signals.py.)"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from dtron.errors import LostRank, UserError
from dtron.renamed import refuse_old_flags
from dtron.runtime.launcher import watch_launcher
from dtron.runtime.output import complain, escape_output, leave_output
from dtron.runtime.signals import Termination, allow_interrupts, stop_at_once

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
NUMBERS += ("TORCHELASTIC_RESTART_COUNT",)
MORE_MEMORY = (
    "lower --micro-batch or --data.seq-len, use --recompute full or --zero 3, or give the mesh "
    "more ranks"
)
OF_THE_DISK = {
    errno.EACCES: "allow this user to read and to write it",
    errno.EPERM: "allow this user to read and to write it",
    errno.EROFS: "choose a folder that can be written",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "mend the links",
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space",
    errno.EFBIG: "raise the limit of this shell on the size of a file",
    errno.EIO: "mend the disk",
    errno.ESTALE: "mount the disk again",
}
"""Errors of the operating system that are never a fault of the program, each with its remedy."""
OTHERS_WAIT = 10.0  # seconds in which rank 0 may report an error that every rank has


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError instead of printing its usage and exiting. It takes no
    abbreviations, and it refuses the old name of a flag."""

    def __init__(self, **options: Any):
        self._flags: list[str] = []
        super().__init__(**options, allow_abbrev=False)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        self._flags += names
        return super().add_argument(*names, **options)

    def parse_known_args(
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        args = sys.argv[1:] if args is None else list(args)
        refuse_old_flags(args, self._flags)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def before_imports() -> None:
    """Prepare a program for its slow imports: torch takes seconds.

    Ctrl-C and the end of torchrun end the program with one line. torch's C++ code reports errors
    only: when torchrun dies, each of its warnings has thirty lines. A name of a file need not be
    text that the terminal can show: what it cannot show is escaped."""
    stop_at_once()
    escape_output()
    watch_launcher()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def run_cli(main: Callable[[list[str]], int], argv: list[str]) -> int:
    """Run a program. A ``UserError`` becomes one line on stderr and exit code 2. So does a file or
    a folder that cannot be used (``OF_THE_DISK``). Any other exception is a bug in the program and
    keeps its traceback."""
    allow_interrupts()
    termination = Termination()
    if "WORLD_SIZE" in os.environ:
        termination.install()
    try:
        check_environment()
        watch_launcher()
        code = main(argv)
    except UserError as error:
        text = "error: " + " ".join(str(error).split())
        code, lost = 2, isinstance(error, LostRank)
    except OSError as error:
        if error.errno not in OF_THE_DISK or error.filename is None:
            raise
        text = f"error: {error.filename}: {error.strerror}; {OF_THE_DISK[error.errno]}"
        code, lost = 2, False
    except (RuntimeError, MemoryError) as error:
        if asked := _out_of_memory(error):
            text = f"error: out of memory ({asked}); {MORE_MEMORY}"
            code, lost = 2, False
        elif "WORLD_SIZE" not in os.environ or not (reason := _lost(error)):
            raise
        else:
            text = f"error: another rank has died or hangs ({reason}); see the output of that rank"
            code, lost = 2, True
    except KeyboardInterrupt:
        text, code, lost = "stopped", 130, False
    else:
        leave_output()
        return code
    own = os.environ.get("RANK", "0")
    rank = int(own) if own.isdecimal() else 0
    if code == 130 and rank:
        os._exit(code)  # Ctrl-C reaches every rank, and rank 0 reports it
    if lost and (missing := _missing()):
        text = f"{text}; {missing}"
    # If every rank has the same error, rank 0 reports the error. torchrun then ends the other ranks
    # while they wait here. An error of this rank alone is printed after the wait.
    if rank and not lost and termination.wait(OTHERS_WAIT):
        os._exit(code)
    complain(f"rank {rank}: {text}" if rank else text)
    leave_output()
    if "WORLD_SIZE" in os.environ:
        os._exit(code)  # skip process group teardown: other ranks may wait in it
    return code


def check_environment() -> None:
    """Raise UserError for a variable of torchrun that is no number."""
    for name in NUMBERS:
        value = os.environ.get(name, "0")
        if not (value.isascii() and value.isdecimal()):
            raise UserError(
                f"{name}={value!r}: must be a whole number, as torchrun sets it; start the program "
                f"with torchrun, or unset {name}"
            )


def _missing() -> str:
    """Return the ranks that have died, with their hosts."""
    from dtron.runtime.roll_call import missing_ranks  # imported here: it needs torch

    return missing_ranks()


def _out_of_memory(error: BaseException) -> str:
    """Return what was asked for if memory has run out, on a GPU or a host; empty otherwise."""
    message = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return message or "on the host"
    if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in message:
        return ""
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", message)
    return f"{asked[1]} more" if asked else message[:100]


def _lost(error: BaseException) -> str:
    """Return the part of a gloo or NCCL error that says a rank is lost; empty for any other
    error."""
    message = str(error)
    if type(error).__name__ in ("DistStoreError", "DistNetworkError"):
        return "the store of the job does not answer"
    if "gloo" not in message and "nccl" not in message.lower():
        return ""
    lost = r"Connection (closed|reset) by peer|[Tt]imed out waiting|Application timeout|Broken pipe"
    match = re.search(lost, message)
    return match[0] if match else ""
