"""A small on-disk cache that many processes may fill at the same moment.

Every rank of a job looks up the same entries at the start, so an entry must never be visible
half-written. An entry is written under a temporary name and moved into place with `os.replace`,
which is atomic. This alone makes the cache correct. The lock only saves work: one process builds
the entry, and the other processes wait and read it.

An entry is sealed: it ends with the CRC-32 of its content (``SealedFile``, ``read_sealed``). An
entry with a wrong CRC-32 is built again. (A tokenizer.json has no seal. It is parsed instead.)

The name of an entry contains a hash of all its inputs. Changed inputs make a new name, so no entry
is ever invalidated. Left out: deleting old entries. They are plain files; remove the folder at
will.
"""

import hashlib
import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from glob import escape
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np

from dtron.data.files import expand
from dtron.data.mapped import map_file
from dtron.errors import UserError

T = TypeVar("T")

_SEED = 1  # with 0, four zero bytes would be a sealed file: a crash of the host leaves zeros

FORMAT = "1"
"""Part of every key. Raise it when the meaning of a cached file changes; old files are then not
used."""


def cache_dir() -> Path:
    """Return the folder given by $DTRON_CACHE, or ~/.cache/dtron."""
    return expand(os.environ.get("DTRON_CACHE") or "~/.cache/dtron")


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
        with TemporaryFile(dir=target.parent):
            pass  # where no file can be made, as in /proc, the lock would wait for ever
        with FileLock(f"{target}.lock"):
            value = read(target)  # another process may have built it while this one waited
            if value is None:
                for left in target.parent.glob(f"{escape(target.name)}.*.tmp"):
                    left.unlink()  # of a process that was killed: this one has the lock
                _build(target, write)
                value = read(target)
    except OSError as error:
        raise unwritable(target.parent, error) from error
    if value is None:
        raise RuntimeError(f"the cache file {str(target)!r} does not read back as it was written")
    return value


class SealedFile:
    """A file for writing. Its last four bytes are the CRC-32 of the others."""

    closed = False  # pyarrow asks

    def __init__(self, path: Path) -> None:
        self._file, self._check = path.open("wb"), _SEED

    def write(self, data: Any) -> int:
        self._check = zlib.crc32(data, self._check)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def __enter__(self) -> "SealedFile":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                self._file.write(self._check.to_bytes(4, "little"))


def read_sealed(file: Path) -> np.ndarray | None:
    """Return the content of a sealed file, mapped into memory; None if the file is missing or
    damaged."""
    try:
        data = map_file(file)
    except OSError:
        return None
    content, check = data[:-4], data[-4:]
    whole = len(check) == 4
    whole = whole and zlib.crc32(content.data, _SEED) == int.from_bytes(check.tobytes(), "little")
    return content if whole else None


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raise UserError if ``needed`` bytes have no room on the disk of the cache."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{what} takes {needed / 1e9:.1f} GB in the cache folder {str(folder)!r}, whose disk "
            f"has {free / 1e9:.1f} GB free; set DTRON_CACHE to a folder on a larger disk, or read "
            "the text with --data.streaming"
        )


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
