"""The files that ``--data.path`` names: one file, or the files of a folder that have a reader.

A folder is searched with its subfolders, links to folders included. Everything in it is read, or is
named with the reason why it is skipped. Names that begin with a dot are passed over: ``.git``,
``.cache``.

A file may be compressed: ``.jsonl.gz``, ``.txt.zst``. Left out: compressed columns (``.parquet``
compresses its columns itself), and archives of several files.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from dtron.errors import UserError

T = TypeVar("T")

COLUMNS = (".parquet", ".arrow")
SUFFIXES = (".txt", ".text", ".jsonl", ".json", *COLUMNS)
COMPRESSED = (".gz", ".zst")

MOST_GROWTH = 1000  # times; text that is packed well is a tenth or a twentieth of itself
HARMLESS = 1 << 28  # bytes of text that a file of any size may have
_BUFFER = 1 << 20  # bytes

GIVE = (
    f"give a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file, or a folder of them, as --data.path"
)

_DESCRIBE = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
"""Files that describe a data set and have no rows."""


class Found(NamedTuple):
    """The files at a path.

    ``files``: the files to read, in an order that is the same in every process.
    ``skipped``: the others, each with the reason."""

    files: list[Path]
    skipped: list[tuple[Path, str]]

    def skipped_line(self, path: str, most: int = 8) -> str | None:
        """Return a line that names the skipped files; None if there are none.

        ``path``: the folder that was searched.
        ``most``: the number of names."""
        if not self.skipped:
            return None
        root = expand(path)
        names = [f"{file.relative_to(root)} ({why})" for file, why in self.skipped[:most]]
        more = f" and {len(self.skipped) - most} more" if len(self.skipped) > most else ""
        return f"skipped in {path}: {', '.join(names)}{more}"


def expand(path: str | Path) -> Path:
    """Return a path in which ``~`` is the home folder. Raises UserError if there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{str(path)!r}: {error}; write the path without ~") from error


def suffix_of(file: Path) -> str:
    """Return the suffix that chooses the reader, in lower case: ``.jsonl`` of ``a.jsonl.gz``."""
    name = file.name.lower()
    for compression in COMPRESSED:
        name = name.removesuffix(compression)
    return Path(name).suffix


def is_compressed(file: Path) -> bool:
    """Whether the file is read through a decompressor."""
    return file.suffix.lower() in COMPRESSED


@contextmanager
def opened(file: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed. Raises UserError if the compressed data is damaged."""
    if not is_compressed(file):
        with file.open("rb") as plain:
            yield plain
        return
    import pyarrow

    with file.open("rb") as source:
        try:
            if file.suffix.lower() == ".gz":
                with gzip.open(source) as unpacked:
                    yield io.BufferedReader(_Unpacked(file, unpacked), _BUFFER)
            else:
                unpacked = pyarrow.CompressedInputStream(source, "zstd")
                yield io.BufferedReader(_Unpacked(file, unpacked), _BUFFER)
        except (EOFError, zlib.error, OSError, pyarrow.ArrowException) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the disk, not of a decompressor
            raise UserError(
                f"{str(file)!r} is damaged or no {file.suffix} file ({one_line(error)}); compress "
                "it again, or leave it out of --data.path"
            ) from error


class Growth:
    """The text of one file, counted. A file is a bomb if a few kilobytes of it expand to gigabytes:
    they would fill the memory, or the disk of the cache."""

    def __init__(self, file: Path) -> None:
        self._file, self._size, self._text = file, file.stat().st_size, 0

    def add(self, size: int) -> None:
        """Count ``size`` more bytes. Raises UserError if they are too many for the file's size."""
        self._text += size
        most = max(MOST_GROWTH * self._size, HARMLESS)
        if self._text > most:
            raise UserError(
                f"{str(self._file)!r} has {self._size} bytes and expands to more than {most}; a "
                f"file may expand to {MOST_GROWTH:,} times its size, or to {HARMLESS >> 20} MiB: "
                "leave it out of --data.path, or unpack it"
            )


class _Unpacked(io.RawIOBase):
    """What a decompressor gives, counted."""

    def __init__(self, file: Path, source: Any) -> None:
        self._growth, self._source = Growth(file), source

    def readable(self) -> bool:
        return True

    def readinto(self, memory: Any) -> int:
        count = self._source.readinto(memory)
        self._growth.add(count)
        return count


def one_line(error: BaseException) -> str:
    """Return another library's message in one line of at most 120 characters; the kind of the error
    if it has no message."""
    return " ".join(str(error).split())[:120] or type(error).__name__


def find_files(path: str) -> Found:
    """Find the files at ``path``, a file or a folder. Raises UserError if none has a reader."""
    where = f"--data.path {path!r}"
    root = expand(path)
    try:
        if not path or not root.exists():
            raise UserError(f"{where} does not exist; {GIVE}")
        if root.is_dir():
            found = _in_folder(root)
            if not found.files:
                raise UserError(
                    f"{where} is a folder without any {', '.join(SUFFIXES)} file; {GIVE}"
                )
            return found
    except OSError as error:
        raise UserError(
            f"{where} cannot be read ({error.strerror}); allow this user to read it"
        ) from error
    if not root.is_file():
        raise UserError(f"{where} is neither a file nor a folder; {GIVE}")
    if (why := _no_reader(root)) is not None:
        raise UserError(f"{where} has {why}; {GIVE}")
    return Found([root], [])


def _no_reader(file: Path) -> str | None:
    """Say why a file has no reader; None if it has one."""
    suffix = suffix_of(file)
    if suffix not in SUFFIXES:
        return f"the suffix {file.suffix!r}, which has no reader"
    if is_compressed(file) and suffix in COLUMNS:
        return f"the suffix {suffix + file.suffix!r}, which has no reader: unpack it"
    return None


def _in_folder(root: Path) -> Found:
    def fail(error: OSError) -> None:  # os.walk would skip a folder that it may not list
        raise error

    files: list[Path] = []
    skipped: list[tuple[Path, str]] = []
    seen = {root.resolve()}
    for name, folders, names in os.walk(root, onerror=fail, followlinks=True):
        folder = Path(name)
        kept = []
        for child in sorted(child for child in folders if not child.startswith(".")):
            target = (folder / child).resolve()
            if target in seen:
                skipped.append((folder / child, "a link to a folder that is read already"))
            else:
                seen.add(target)
                kept.append(child)
        folders[:] = kept
        saved = any(child.endswith(".arrow") for child in names)  # by `datasets`
        for child in names:
            if not child.startswith("."):
                file = folder / child
                why = _why_skipped(file, saved)
                files += [file] if why is None else []
                skipped += [] if why is None else [(file, why)]

    def place(file: Path) -> str:
        return file.relative_to(root).as_posix()

    return Found(sorted(files, key=place), sorted(skipped, key=lambda pair: place(pair[0])))


def _why_skipped(file: Path, saved: bool) -> str | None:
    if not file.exists():
        return "a broken link"
    if not file.is_file():
        return "no file"
    if file.name in _DESCRIBE or (saved and file.name == "state.json"):
        return "it describes a data set"
    return _no_reader(file)


def grouped(
    items: Iterable[T], size: Callable[[T], int], most: int, count: int | None = None
) -> Iterator[list[T]]:
    """Yield the items in lists. A list ends where its sizes reach ``most``, or its length
    ``count``."""
    group: list[T] = []
    total = 0
    for item in items:
        group.append(item)
        total += size(item)
        if total >= most or len(group) == count:
            yield group
            group, total = [], 0
    if group:
        yield group
