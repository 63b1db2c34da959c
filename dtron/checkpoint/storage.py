"""Where checkpoints are: in a file system, or in an object store.

Everything above this file is the same for both. ``AnyPath`` is a path in one of them, and
``storage_of`` returns the storage that reads and writes there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from dtron.checkpoint.local_storage import LocalFile, LocalStorage
from dtron.checkpoint.meta import FileMeta, Meta
from dtron.checkpoint.object_storage import ObjectPath, open_store

AnyPath = Path | ObjectPath

_LOCAL_URL = re.compile(r"(?:file|local)://(.*)")


class OpenFile(Protocol):
    """A file that is open for reading. ``size``: in bytes."""

    size: int

    def read_ranges(self, ranges: Sequence[tuple[int, memoryview]]) -> None:
        """Fill each memory with the bytes from its offset on. Raises OSError, also for a file that
        is too short."""

    def close(self) -> None: ...


class Storage(Protocol):
    """Reads and writes checkpoints. Every method raises OSError with a ``strerror`` of one line if
    the place cannot be read or written.

    ``remedy``: what a user can do about a save that fails."""

    remedy: str

    def check(self, folder: Any) -> None:
        """Write and delete a small file: the access is missing now, or not at all."""

    def heads(self, folder: Any) -> dict[str, bytes]:
        """Return the first bytes of ``meta.json`` of each checkpoint, by the checkpoint's name.
        Half-written ones are not among them."""

    def is_link(self, path: Any) -> bool:
        """Whether a checkpoint is a symbolic link, which is never deleted."""

    def open(self, file: Any) -> OpenFile: ...

    def checksum(self, file: Any) -> int:
        """Return the CRC-32 of a file's bytes."""

    def read(self, file: Any, limit: int) -> bytes:
        """Return a file of at most ``limit`` bytes. Raises UserError if it cannot be read."""

    def sizes(self, checkpoint: Any, names: Iterable[str]) -> dict[str, int]:
        """Return the sizes of the regular files of these names, by name."""

    def part(self, goal: Any) -> Any:
        """Return the place where the checkpoint ``goal`` is written."""

    def file_name(self, rank: int) -> str:
        """Return the name of the file of a rank."""

    def begin(self, part: Any) -> None:
        """Prepare the place. One rank calls this."""

    def write(self, file: Any, fill: Callable[[Any], None]) -> FileMeta:
        """Write what ``fill`` writes. Returns when the bytes are safe."""

    def finish(self, part: Any, goal: Any, meta: Meta) -> None:
        """Make a checkpoint of the written files: write ``meta.json``. An older checkpoint of the
        same step is replaced; any other folder of this name is an error. One rank calls this."""

    def discard(self, part: Any, file: Any) -> None:
        """Remove what a failed save has left. Every rank calls this with its file."""

    def remove(self, checkpoint: Any) -> None:
        """Delete a checkpoint. At no moment there is one that lacks files."""

    def clear(self, folder: Any) -> None:
        """Remove checkpoints that earlier processes left half-written."""

    def is_full(self, folder: Any) -> bool:
        """Whether no space is left."""


def storage_of(place: AnyPath) -> Storage:
    return place.storage if isinstance(place, ObjectPath) else LocalStorage()


def any_path(text: str, flag: str = "") -> AnyPath:
    """Return the place that a user has given: a path, or a URL as ``s3://bucket/runs/a``. Raises
    UserError for a URL that cannot be opened.

    ``flag``: for the message."""
    if local := _LOCAL_URL.fullmatch(text):
        return Path(local[1])
    return open_store(text, flag) if "://" in text else Path(text)


def open_file(place: AnyPath, *, follow: bool = True) -> OpenFile:
    """Open a file for reading. ``follow``: whether it may be a symbolic link."""
    return LocalFile(place, follow=follow) if isinstance(place, Path) else place.storage.open(place)
