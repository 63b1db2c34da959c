"""Output that cannot stop training: lines for the user, and files of records.

A reader may go away (``train.py | head``), and a disk may fill up. Training goes on in both cases.
So a failed write is reported once, on stderr, and every later write is tried again.

Every line is one ``write``. So the lines of several ranks on one terminal do not run together.

Left out: a buffer that keeps lines until they can be written. Without a reader it would only grow.
"""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import shutil
import stat
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from dtron.errors import UserError

RENEWED = 0.2  # seconds between two live lines
CLEAR = "\x1b[K"  # removes the rest of a line of a terminal


class Output:
    """The standard output of the main rank. The other ranks pass ``main=False``, and print
    nothing."""

    def __init__(self, main: bool = True) -> None:
        self._main, self._reported = main, False
        self._live, self._shown = False, -math.inf  # whether a live line stands, and since when

    def say(self, text: str) -> None:
        """Print a text. A warning goes to stderr if the standard output cannot be written."""
        if not self._main:
            return
        self.end_live()
        reason = write_line(sys.stdout, text)
        if reason and not self._reported:
            self._reported = True
            complain(f"warning: standard output cannot be written ({reason}); training goes on")
        if reason and text.startswith("warning: "):
            complain(text)

    def live(self, text: Callable[[], str]) -> None:
        """Show a line that the next line replaces. It is shown in a terminal only, cut to its
        width, and not more often than every ``RENEWED`` seconds."""
        now = time.monotonic()
        if not self._main or now - self._shown < RENEWED or not is_terminal(sys.stdout):
            return
        width = shutil.get_terminal_size().columns - 1
        if write_line(sys.stdout, text()[:width], CLEAR, begin="\r") is None:
            self._live, self._shown = True, now

    def end_live(self) -> None:
        """Remove the live line."""
        if self._live:
            self._live = False
            write_line(sys.stdout, "", CLEAR, begin="\r")


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal that can replace a line."""
    try:
        return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # it is closed
        return False


def write_line(stream: TextIO | None, text: str, end: str = "\n", begin: str = "") -> str | None:
    """Write a line at once. Return why it could not be written; None: it was written.

    ``end``: what ends the line; nothing: a piece of a line.
    ``begin``: what is written before the line.

    Control characters are dropped, except for line feeds and tabs. They may come from a file, and
    could change the state of a terminal."""
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
    if stream is None:  # the program was started with a closed descriptor
        return "it is closed"
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(begin + text.encode(encoding, "backslashreplace").decode(encoding) + end)
        stream.flush()
    except (OSError, ValueError) as error:  # ValueError: a stream that was closed
        return getattr(error, "strerror", None) or str(error)
    return None


def complain(text: str) -> None:
    """Print a line on stderr, if this is possible."""
    write_line(sys.stderr, text)


def escape_output() -> None:
    """Escape the characters that the output cannot encode. Otherwise such a name of a file, or a
    letter on a terminal that has ASCII only, ends the program with an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def leave_output() -> None:
    """Give up text that cannot be written. Otherwise Python tries again when it exits, and ends the
    program with an error of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                number, nowhere = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)


# ---- files


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn an OSError into a UserError: the user can fix a file that cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); free space, or choose another --run-dir"
        ) from error


def replace_file(path: Path, content: bytes) -> None:
    """Write a file. A reader, and a run that is killed, has the old content or the new content."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(content)
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def append_line(path: Path, text: str) -> None:
    """Append a line to a file, or nothing. The file may have been deleted: then it begins anew."""
    content = (text + "\n").encode()
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    file = os.open(path, flags | os.O_NONBLOCK, 0o666)  # a pipe without a reader would never open
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "no regular file", str(path))
        size = os.fstat(file).st_size
        try:
            if os.write(file, content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(file, size)
            raise
    finally:
        os.close(file)
