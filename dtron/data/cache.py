"""A small on-disk cache that many processes may fill at the same moment.

Every rank of a job looks up the same entries at the start, so an entry must never be visible
half-written. An entry is written under a temporary name and moved into place with `os.replace`,
which is atomic. This alone makes the cache correct. The lock only saves work: one process builds
the entry, and the other processes wait and read it.

The name of an entry contains a hash of all its inputs. Changed inputs make a new name, so no entry
is ever invalidated. Left out: deleting old entries. They are plain files; remove the folder at
will.
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
"""Part of every key. Raise it when the meaning of a cached file changes; old files are then not
used."""


def cache_dir() -> Path:
    """Return the folder given by $DTRON_CACHE, or ~/.cache/dtron."""
    return Path(os.environ.get("DTRON_CACHE") or "~/.cache/dtron").expanduser()


def digest(parts: Iterable[str | bytes]) -> str:
    """Return a short hash of a sequence. It includes each part's length, so ("ab", "c") and
    ("a", "bc") differ."""
    state = hashlib.blake2b(FORMAT.encode(), digest_size=12)
    for part in parts:
        # "surrogatepass": Python keeps bytes of a file name that are no UTF-8 as surrogates.
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def cached(target: Path, read: Callable[[Path], T | None], write: Callable[[Path], None]) -> T:
    """Return `read(target)`. If this is None (the file is missing or damaged), `write` builds the
    file first."""
    value = read(target)
    if value is not None:
        return value
    from filelock import FileLock  # imported late: a start that finds its entries does not need it

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
        f"the cache folder {str(folder)!r} cannot be written ({error.strerror or error}); set "
        "DTRON_CACHE to a folder that this user may write, on a disk with room"
    )


def _build(target: Path, write: Callable[[Path], None]) -> None:
    # A random name, not the process id: two hosts that share a folder may have equal ids.
    temporary = target.with_name(f"{target.name}.{uuid4().hex}.tmp")
    try:
        write(temporary)
        # Without fsync, a crash of the host could leave the new name without the written blocks.
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
