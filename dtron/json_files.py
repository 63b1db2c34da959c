"""JSON files that are read back, each with a type.

A file from a disk may be cut, edited, of another program or of an attacker. So every JSON file is
read in three steps. The file must be regular: a pipe or a device would never end. Its size has a
limit. And its content must have a type, which ``msgspec`` checks while it decodes: the error has
the path of the value, as in ``$.files``. Nothing in a file is executed.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from dtron.errors import UserError

T = TypeVar("T")
LIMIT = 1 << 26  # bytes; a config, an index or a line of metrics is far smaller


def open_regular(path: Path, *, follow: bool = True) -> int:
    """Open a regular file for reading and return its descriptor. Raises OSError otherwise.

    ``follow``: whether the file may be a symbolic link. A Hugging Face cache has links; a
    checkpoint has none."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        code = errno.EISDIR if stat.S_ISDIR(mode) else 0
        raise OSError(code, os.strerror(code) if code else "no regular file")
    return handle


def is_there(path: Path) -> bool:
    """Whether there is anything at a path. `read_bytes` then says what is wrong with it: a pipe or
    a folder in the place of a file is not passed over. Raises UserError if the folder hides it."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a name with a null byte
        return False
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make it readable") from error
    return True


def read_bytes(path: Path, limit: int = LIMIT, *, follow: bool = True) -> bytes:
    """Return the content of a regular file of at most ``limit`` bytes. Raises UserError
    otherwise."""
    try:
        with os.fdopen(open_regular(path, follow=follow), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise UserError(f"{path}: has {size} bytes; such a file has at most {limit}")
            # A read allocates as many bytes as it may return. A file of /proc has the size 0.
            return file.read(min(limit, max(size, 1 << 20)))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be read ({reason}); make it readable") from error


def decode(data: bytes, kind: type[T], where: str, remedy: str = "mend the file") -> T:
    """Decode JSON as a type. Raises UserError with the path of the first value of another type."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        said = str(error) or type(error).__name__
        raise UserError(f"{where}: cannot be read as JSON ({said}); {remedy}") from error


def read_json(path: Path, kind: type[T], limit: int = LIMIT) -> T:
    """Read a JSON file as a type."""
    return decode(read_bytes(path, limit), kind, str(path))


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object whose keys are not known."""
    return read_json(path, dict[str, Any])
