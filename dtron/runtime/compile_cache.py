"""The folder of compiled code, which later runs load instead of compiling.

torch keeps what it compiles: graphs, the code of kernels, and kernels. The key of each entry
contains everything that it depends on: the graph, the versions, the device. So the folder can be
shared by jobs, and copied to other machines under the same path. Entries are written under a
temporary name and moved into place, except for libraries of C++ code. A process that is killed
while it links a library leaves half of it, and every later run would fail to load it. So
``open_compile_cache`` removes libraries without an end.

Left out: one rank that compiles for all. The number of the GPU is part of the code, so ranks of one
host compile different entries.
"""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

from dtron.data.cache import cache_dir
from dtron.data.files import expand
from dtron.errors import UserError

FOLDER = "TORCHINDUCTOR_CACHE_DIR"  # the variable from which torch reads the folder


def open_compile_cache(folder: str | None) -> None:
    """Let torch use this folder from now on. Raises UserError if it cannot be written.

    ``folder``: None: the folder that the environment names, or ~/.cache/dtron/compile."""
    named = folder is not None or FOLDER in os.environ
    path = expand(folder or os.environ.get(FOLDER) or cache_dir() / "compile").absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        if named:
            raise UserError(
                f"--compile-cache {path}: {error.strerror}; name a folder that can be written"
            ) from error
        return  # torch makes a folder for this machine
    os.environ[FOLDER] = str(path)
    os.environ.setdefault("TRITON_CACHE_DIR", str(path / "triton"))
    remove_half_written(path)


def describe_first_step(seconds: float) -> str:
    """Say whether the first step has compiled or loaded its code.

    ``seconds``: the time of the first step."""
    from torch._dynamo.utils import counters  # imported here: the compiler has loaded it

    found, folder = counters["inductor"], os.environ.get(FOLDER, "torch")
    if found["fxgraph_cache_hit"] and not found["fxgraph_cache_miss"]:
        return f"loaded compiled code in {seconds:.1f} s, from {folder}"
    return f"compiled in {seconds:.1f} s; {folder} keeps the code for later runs"


def remove_half_written(folder: Path) -> None:
    """Remove the libraries that a killed process has left without an end."""
    for library in folder.rglob("*.so"):
        if not is_whole(library) and not _being_written(library, folder):
            library.unlink(missing_ok=True)


def is_whole(library: Path) -> bool:
    """Whether an ELF library has its last part, the table of sections. Other files are whole."""
    try:
        size = library.stat().st_size
        with library.open("rb") as file:
            head = file.read(64)
    except OSError:
        return True
    if len(head) < 64 or head[:4] != b"\x7fELF":
        return False
    if head[4] != 2:  # no 64-bit library
        return True
    order = "<" if head[5] == 1 else ">"
    (table,) = struct.unpack_from(f"{order}Q", head, 0x28)
    entry, count = struct.unpack_from(f"{order}HH", head, 0x3A)
    return table > 0 and table + entry * count <= size


def _being_written(library: Path, folder: Path) -> bool:
    """Whether a process holds torch's lock of this library."""
    from filelock import FileLock, Timeout

    lock = folder / "locks" / f"{library.name.partition('.')[0]}.lock"
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
