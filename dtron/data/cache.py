"""A small on-disk cache that many processes may fill at the same moment.

Every rank of a job starts with the same question ("are these documents tokenised already?"), so a
cache entry must never be visible half-written. The entry is written under a temporary name and
moved into place with `os.replace`, which is atomic; that alone makes the answer right. The lock
around it only saves work: one process builds the entry, and the others wait and read it.

The name of an entry holds a hash of everything that it depends on, so nothing is ever invalidated:
changed inputs make a new name. Left out: deleting old entries. They are plain files; remove the
folder at will.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from dtron.errors import UserError

T = TypeVar("T")

FORMAT = "1"
"""Part of every key: raise it when the meaning of a cached file changes, and old files are left
alone."""


def cache_dir() -> Path:
    """The folder given by $DTRON_CACHE, or ~/.cache/dtron."""
    return Path(os.environ.get("DTRON_CACHE") or "~/.cache/dtron").expanduser()


def digest(parts: Iterable[str | bytes]) -> str:
    """A short hash of a sequence; each part's length goes in too, so ("ab", "c") is not ("a",
    "bc")."""
    state = hashlib.blake2b(FORMAT.encode(), digest_size=12)
    for part in parts:
        # "surrogatepass": file names may hold bytes that are no UTF-8, which Python keeps as
        # surrogates.
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def cached(target: Path, read: Callable[[Path], T | None], write: Callable[[Path], None]) -> T:
    """`read(target)`, after `write` has built it where `read` answers None: nothing there, or
    damaged."""
    value = read(target)
    if value is not None:
        return value
    from filelock import (
        FileLock,
    )  # here, not above: a start that finds its cache full does not need it

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            value = read(target)  # another process may have built it while this one waited
            if value is None:
                _build(target, write)
                value = read(target)
    except OSError as error:
        raise unwritable(target.parent, error) from error
    if value is None:
        raise RuntimeError(f"the cache file {str(target)!r} does not read back as it was written")
    return value


def unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"the cache folder {str(folder)!r} cannot be written ({error.strerror or error}); set DTRON_CACHE to "
        "a folder that this user may write, on a disk with room"
    )


def _build(target: Path, write: Callable[[Path], None]) -> None:
    # A random name, not the process id: two hosts that share a folder may have equal ids.
    temporary = target.with_name(f"{target.name}.{uuid4().hex}.tmp")
    try:
        write(temporary)
        # Without this a crash of the host could leave the new name on blocks that never reached the
        # disk.
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
