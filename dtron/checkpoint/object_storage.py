"""Checkpoints in an object store, through fsspec: ``s3://bucket/runs/a``.

An object store has no folders and no rename, and an object appears when its upload is complete.
So ``meta.json`` is written last: a checkpoint is whole if it has one. It is deleted first. The
other files have names that no second save uses. So a save that replaces a checkpoint of the same
step writes beside it, and the new ``meta.json`` replaces the old one at once.

A read asks for ranges of bytes. Ranges that are close to each other are one request, and several
requests run at a time. A checksum is computed while a file is written: nothing is downloaded after
a save.
"""

from __future__ import annotations

import re
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from dtron.checkpoint.meta import HEAD_BYTES, META, FileMeta, Meta, encode_meta, parse_head
from dtron.errors import UserError

_GAP = 1 << 16  # bytes; reading so many takes less time than another request
_PIECE = 1 << 24  # bytes of one request
_AT_ONCE = 8  # requests
_WRITE = 1 << 27  # bytes that fsspec gets at a time, because it copies them
_OWN_FILE = re.compile(r"rank-\d{5,}-[0-9a-f]{8}\.safetensors")
_OWN_FOLDER = re.compile(r"step-\d{8,}")

Range = tuple[int, memoryview]  # first byte, memory


@dataclass(frozen=True, order=True)
class ObjectPath:
    """A place in an object store, with the methods of ``Path`` that checkpoints need.

    ``key``: as ``bucket/runs/a``."""

    key: str
    storage: ObjectStorage = field(compare=False, repr=False)

    def __truediv__(self, name: str) -> ObjectPath:
        return replace(self, key=f"{self.key}/{name}")

    def __str__(self) -> str:
        return f"{self.storage.scheme}://{self.key.lstrip('/')}"

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> ObjectPath:
        return replace(self, key=self.key.rpartition("/")[0])


def open_store(url: str, flag: str) -> ObjectPath:
    """Return the place of a URL. No request is made. Raises UserError for a URL that fsspec cannot
    open: its package is missing, or it names no bucket.

    ``flag``: where the URL comes from, for the message."""
    from fsspec.core import url_to_fs  # not needed by runs that save to a disk

    where, (scheme, _, rest) = f"{flag} {url}".strip(), url.partition("://")
    if not rest.strip("/"):
        raise UserError(f"{where}: has no bucket; give {scheme}://BUCKET/PATH")
    try:
        fs, key = url_to_fs(url.rstrip("/"), use_listings_cache=False)
    except ImportError as error:
        extra = "pip install 'dtron[object-storage]'" if scheme == "s3" else _line(error)
        raise UserError(f"{where}: needs a package that is not installed; {extra}") from error
    except Exception as error:  # each store's library has errors of its own
        raise UserError(f"{where}: cannot be opened ({_line(error)}); give another URL") from error
    return ObjectPath(key, ObjectStorage(fs, scheme))


class ObjectFile:
    """An object that is read by ranges. ``size``: in bytes."""

    def __init__(self, fs: Any, key: str) -> None:
        self._fs, self._key = fs, key
        with _one_line():
            self.size = int(fs.size(key))

    def read_ranges(self, ranges: Sequence[Range]) -> None:
        """See ``LocalFile.read_ranges``."""
        planned = list(requests(ranges))
        for i in range(0, len(planned), _AT_ONCE):
            group = planned[i : i + _AT_ONCE]
            starts = [request[0][0] for request in group]
            stops = [request[-1][0] + len(request[-1][1]) for request in group]
            with _one_line():
                keys = [self._key] * len(group)
                found = self._fs.cat_ranges(keys, starts, stops, on_error="raise")
            for request, start, stop, data in zip(group, starts, stops, found, strict=True):
                if len(data) != stop - start:
                    raise OSError(0, "ends early, it was changed while it was read")
                for offset, memory in request:
                    memory[:] = data[offset - start : offset - start + len(memory)]

    def close(self) -> None:
        """There is nothing to close."""


def requests(
    ranges: Sequence[Range], gap: int = _GAP, largest: int = _PIECE
) -> Iterator[list[Range]]:
    """Yield the ranges that one request reads, pieces of large ones: at most ``gap`` bytes between
    two, and at most ``largest`` bytes together."""
    request: list[Range] = []
    for first, whole in ranges:
        for a in range(0, len(whole), largest):
            offset, memory = first + a, whole[a : a + largest]
            end = request[-1][0] + len(request[-1][1]) if request else 0
            joins = request and 0 <= offset - end <= gap
            if joins and offset + len(memory) - request[0][0] <= largest:
                request.append((offset, memory))
                continue
            if request:
                yield request
            request = [(offset, memory)]
    if request:
        yield request


@dataclass(frozen=True)
class ObjectStorage:
    """See ``storage.Storage``. ``fs``: a file system of fsspec."""

    fs: Any
    scheme: str
    remedy = "check the network and the access to the object store"

    def check(self, folder: ObjectPath) -> None:
        with _one_line():
            self.fs.pipe_file((folder / "write-test").key, b"dtron")
            self.fs.rm_file((folder / "write-test").key)

    def heads(self, folder: ObjectPath) -> dict[str, bytes]:
        names = list(self._listed(folder, "directory"))
        keys = [(folder / name / META).key for name in names]
        with _one_line():
            found = self.fs.cat_ranges(
                keys, [0] * len(keys), [HEAD_BYTES] * len(keys), on_error="return"
            )
            for x in found:
                if isinstance(x, Exception) and not isinstance(x, FileNotFoundError):
                    raise x
        return {name: x for name, x in zip(names, found, strict=True) if isinstance(x, bytes)}

    def is_link(self, path: ObjectPath) -> bool:
        return False

    def open(self, file: ObjectPath) -> ObjectFile:
        return ObjectFile(self.fs, file.key)

    def checksum(self, file: ObjectPath) -> int:
        opened, crc = self.open(file), 0
        buffer = memoryview(bytearray(min(opened.size, _AT_ONCE * _PIECE)))
        for start in range(0, opened.size, len(buffer) or 1):
            part = buffer[: opened.size - start]
            opened.read_ranges([(start, part)])
            crc = zlib.crc32(part, crc)
        return crc

    def read(self, file: ObjectPath, limit: int) -> bytes:
        try:
            size = self.open(file).size
            if size > limit:
                raise UserError(f"{file}: has {size} bytes; such a file has at most {limit}")
            with _one_line():
                return self.fs.cat_file(file.key)
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}); {self.remedy}") from error

    def sizes(self, checkpoint: ObjectPath, names: Iterable[str]) -> dict[str, int]:
        return self._listed(checkpoint, "file")  # one request, and not one for each name

    def part(self, goal: ObjectPath) -> ObjectPath:
        return goal

    def file_name(self, rank: int) -> str:
        return f"rank-{rank:05d}-{secrets.token_hex(4)}.safetensors"

    def begin(self, part: ObjectPath) -> None:
        """Nothing is to be made. Objects of an earlier save are deleted when this one is whole."""

    def write(self, file: ObjectPath, fill: Callable[[Any], None]) -> FileMeta:
        with _one_line():
            opened = self.fs.open(file.key, "wb", autocommit=False)
            try:
                summed = _Summed(opened)
                fill(summed)
                opened.close()
                opened.commit()
            except BaseException:
                with suppress(Exception):
                    opened.discard()  # else the store keeps the parts, and their bill
                raise
            size = int(self.fs.size(file.key))
        if size != summed.size:
            raise OSError(0, f"{file.name} has {size} of {summed.size} bytes after its upload")
        return FileMeta(summed.size, summed.crc32)

    def finish(self, part: ObjectPath, goal: ObjectPath, meta: Meta) -> None:
        written = self._listed(goal, "file")
        if META in written:
            with _one_line():
                head = self.fs.cat_file((goal / META).key, start=0, end=HEAD_BYTES)
            if parse_head(head) is None:
                raise OSError(0, f"{goal.name} is there already, and is no checkpoint")
        with _one_line():
            self.fs.pipe_file((goal / META).key, encode_meta(meta))
        self._remove_own(goal, written.keys() - meta.files.keys())

    def discard(self, part: ObjectPath, file: ObjectPath) -> None:
        with suppress(Exception):
            self.fs.rm_file(file.key)

    def remove(self, checkpoint: ObjectPath) -> None:
        with _one_line():
            self.fs.rm_file((checkpoint / META).key)
            self.fs.rm(checkpoint.key, recursive=True)

    def clear(self, folder: ObjectPath) -> None:
        whole = self.heads(folder)
        for name in self._listed(folder, "directory"):
            if name not in whole and _OWN_FOLDER.fullmatch(name):
                self._remove_own(folder / name, self._listed(folder / name, "file"))

    def is_full(self, folder: ObjectPath) -> bool:
        return False

    def _remove_own(self, folder: ObjectPath, names: Iterable[str]) -> None:
        """Remove files that no checkpoint lists. A file that stays is not read."""
        for name in names:
            if _OWN_FILE.fullmatch(name):
                self.discard(folder, folder / name)

    def _listed(self, folder: ObjectPath, kind: str) -> dict[str, int]:
        """Return the size of each file, or each directory, in a folder. A folder that is not there
        has none."""
        try:
            with _one_line():
                found = self.fs.ls(folder.key, detail=True)
        except FileNotFoundError:
            return {}
        entries = (entry for entry in found if entry["type"] == kind)
        return {e["name"].rstrip("/").rpartition("/")[2]: int(e["size"] or 0) for e in entries}


class _Summed:
    """Hands bytes on in pieces. Counts them, and computes their CRC-32."""

    def __init__(self, file: Any) -> None:
        self._file, self.size, self.crc32 = file, 0, 0

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for a in range(0, len(view), _WRITE):
            piece = view[a : a + _WRITE]
            self._file.write(piece)
            self.crc32 = zlib.crc32(piece, self.crc32)
        self.size += len(view)


@contextmanager
def _one_line() -> Iterator[None]:
    """Turn every error of fsspec and of a store's library into an OSError whose ``strerror`` is one
    line."""
    try:
        yield
    except (UserError, AssertionError):
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(0, _line(error)) from error
    except Exception as error:
        raise OSError(0, _line(error)) from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
