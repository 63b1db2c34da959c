"""Files that are mapped into memory, read-only: ``map_file``.

A read behind the end of a mapped file ends the process without a word (SIGBUS), and any program may
cut a file while it is mapped. So whoever reads from such an array calls ``check_uncut`` first. Left
out: a file that is cut between this call and the read.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from dtron.errors import UserError
from dtron.json_files import open_regular


class _MappedFile(mmap.mmap):
    path: Path


def map_file(file: Path) -> np.ndarray:
    """Return the bytes of a regular file. Raises OSError for another file, and for one that cannot
    be read."""
    handle = open_regular(file)
    try:
        if not os.fstat(handle).st_size:  # cannot be mapped
            return np.empty(0, np.uint8)
        memory = _MappedFile(handle, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(handle)  # the map has a descriptor of its own
    memory.path = file
    return np.frombuffer(memory, np.uint8)


def check_uncut(array: np.ndarray) -> None:
    """Raise UserError if ``array`` is a part of a mapped file that has become shorter."""
    base: Any = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    if isinstance(base, _MappedFile) and base.size() < len(base):
        raise UserError(
            f"{str(base.path)!r} was cut from {len(base)} to {base.size()} bytes during the run; "
            "give it back its content, and go on with --resume"
        )
