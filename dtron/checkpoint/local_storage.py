"""Checkpoints in a file system.

``step-00000100`` is written as ``step-00000100.part`` and renamed when it is complete. So a reader
sees a complete checkpoint or none.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dtron.checkpoint.meta import HEAD_BYTES, META, FileMeta, Meta, encode_meta, parse_head
from dtron.json_files import is_there, open_regular, read_bytes

_CHUNK = 1 << 24  # bytes
_ONE_READ = 1 << 30  # Linux reads at most 2 GiB at a time
_HALF_WRITTEN = re.compile(r"step-\d{8,}(\.old)?\.part")


class LocalFile:
    """A regular file that is open for reading.

    ``size``: in bytes.
    ``follow``: whether the file may be a symbolic link. Raises OSError if it cannot be opened."""

    def __init__(self, path: Path, *, follow: bool = True) -> None:
        self._handle = open_regular(path, follow=follow)
        self.size = os.fstat(self._handle).st_size

    def read_ranges(self, ranges: Sequence[tuple[int, memoryview]]) -> None:
        """Fill each memory with the bytes from its offset on. Raises OSError, also for a file that
        is too short."""
        for offset, memory in ranges:
            done = 0
            while done < len(memory):
                part = memory[done : done + _ONE_READ]
                n = os.preadv(self._handle, [part], offset + done)
                if not n:
                    raise OSError(0, "ends early, it was changed while it was read")
                done += n

    def close(self) -> None:
        os.close(self._handle)


class LocalStorage:
    """See ``storage.Storage``."""

    remedy = "free space, or choose another --run-dir"

    def check(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass

    def heads(self, folder: Path) -> dict[str, bytes]:
        if not is_there(folder):
            return {}
        found = {}
        for name in sorted(os.listdir(folder)):
            path = folder / name
            there = not _HALF_WRITTEN.fullmatch(name) and is_there(path / META)
            if there and (path / META).is_file():
                found[name] = self._head(path)
        return found

    def is_link(self, path: Path) -> bool:
        return path.is_symlink()

    def open(self, file: Path) -> LocalFile:
        return LocalFile(file, follow=False)

    def checksum(self, file: Path) -> int:
        return describe(file).crc32

    def read(self, file: Path, limit: int) -> bytes:
        return read_bytes(file, limit, follow=False)

    def sizes(self, checkpoint: Path, names: Iterable[str]) -> dict[str, int]:
        files = (checkpoint / name for name in names)
        regular = (file for file in files if file.is_file() and not file.is_symlink())
        return {file.name: file.stat().st_size for file in regular}

    def part(self, goal: Path) -> Path:
        return goal.with_name(goal.name + ".part")

    def file_name(self, rank: int) -> str:
        return f"rank-{rank:05d}.safetensors"

    def begin(self, part: Path) -> None:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)

    def write(self, file: Path, fill: Callable[[Any], None]) -> FileMeta:
        with file.open("wb") as opened:
            fill(opened)
            opened.flush()
            os.fsync(opened.fileno())
        return describe(file)

    def finish(self, part: Path, goal: Path, meta: Meta) -> None:
        self.write(part / META, lambda file: file.write(encode_meta(meta)))
        old = None
        if goal.exists():
            if any(goal.iterdir()) and parse_head(self._head(goal)) is None:
                raise OSError(0, f"{goal.name} is there already, and is no checkpoint")
            old = self._set_aside(goal)
        part.rename(goal)
        opened = os.open(goal.parent, os.O_RDONLY)
        os.fsync(opened)  # so that the new name survives a crash of the machine
        os.close(opened)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)

    def discard(self, part: Path, file: Path) -> None:
        shutil.rmtree(part, ignore_errors=True)

    def remove(self, checkpoint: Path) -> None:
        shutil.rmtree(self._set_aside(checkpoint))

    def clear(self, folder: Path) -> None:
        for path in folder.glob("step-*.part"):
            if _HALF_WRITTEN.fullmatch(path.name) and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)

    def is_full(self, folder: Path) -> bool:
        with suppress(OSError):
            return shutil.disk_usage(folder).free < 1 << 20
        return False

    def _head(self, checkpoint: Path) -> bytes:
        """Return the first bytes of ``meta.json``, none if it cannot be read."""
        try:
            handle = open_regular(checkpoint / META, follow=False)
        except OSError:
            return b""
        with os.fdopen(handle, "rb") as file:
            return file.read(HEAD_BYTES)

    def _set_aside(self, path: Path) -> Path:
        """Give a folder the name of a half-written one, so that no interrupted deletion leaves a
        checkpoint that lacks files."""
        aside = path.with_name(path.name + ".old.part")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        return aside


def describe(file: Path) -> FileMeta:
    """Return size and CRC-32 of a file, read back from the disk."""
    crc = 0
    with os.fdopen(open_regular(file, follow=False), "rb") as opened:
        while chunk := opened.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return FileMeta(file.stat().st_size, crc)
