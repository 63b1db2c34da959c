"""The files of copies in memory (memory_copies.py): one for each step and rank, and which of them a
new start takes.

A file is a line of JSON, ``Head``, and then the bytes of a rank's tensors in their order.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtron.errors import UserError

CHUNK = 1 << 26  # bytes that are read or sent at once
HEAD_BYTES = 512
NAME = re.compile(r"step-(\d{8,})-rank-(\d{5,})")


@dataclass(frozen=True)
class Head:
    """The first line of a file.

    ``samples``, ``updates``: see ``meta.Meta``.
    ``size``, ``crc32``: of the bytes after this line.
    ``key``: stands for the run, its mesh and its optimizer; see ``key_of``."""

    step: int
    rank: int
    samples: int
    updates: int
    size: int
    key: str
    crc32: int = 0

    @property
    def name(self) -> str:
        """The name of the file."""
        return f"step-{self.step:08d}-rank-{self.rank:05d}"


def write(folder: Path, head: Head, parts: Iterable[memoryview]) -> Head:
    """Write a file and return its head, with the checksum. All parts are taken, also after an
    error: another rank may send them. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    goal, crc, problem = folder / head.name, 0, None
    part = goal.with_suffix(".part")
    with part.open("wb") as file:
        file.seek(HEAD_BYTES)
        for data in parts:
            crc = zlib.crc32(data, crc)
            try:
                file.write(data)
            except OSError as error:
                problem = problem or error
        head = replace(head, crc32=crc)
        if problem is None:
            file.seek(0)
            file.write(json.dumps(asdict(head)).encode().ljust(HEAD_BYTES - 1) + b"\n")
    if problem is not None:
        part.unlink()
        raise problem
    part.rename(goal)
    return head


def read_head(file: Any) -> Head:
    """Read the head of an open file. Raises ValueError or TypeError if it has none."""
    return Head(**json.loads(file.read(HEAD_BYTES)))


def read(path: Path, tensors: Sequence[Tensor]) -> Head:
    """Fill tensors from a file."""
    with path.open("rb") as file, torch.no_grad():
        head = read_head(file)
        for x in tensors:
            read = torch.empty_like(x, device="cpu", memory_format=torch.contiguous_format)
            file.readinto(octets(read))
            x.copy_(read)
    return head


def whole(path: Path) -> Head | None:
    """Return the head of a file; None if the file is cut off, changed, or something else."""
    try:
        with path.open("rb") as file:
            head, crc = read_head(file), 0
            while data := file.read(CHUNK):
                crc = zlib.crc32(data, crc)
        return head if head.name == path.name and crc == head.crc32 else None
    except (OSError, ValueError, TypeError):
        return None


class Held(NamedTuple):
    """A whole file that the process ``by`` can read."""

    head: Head
    by: int


def holders(
    held: Sequence[Held], sizes: Sequence[int], hosts: Sequence[int]
) -> tuple[int, dict[int, int]] | None:
    """Return the newest step of which every rank's file is held, and the process from which each
    rank takes it: one of its own host if there is one. None: there is no such step.

    ``sizes``, ``hosts``: of each rank, the bytes of its tensors and its host."""
    steps: dict[int, dict[int, list[int]]] = {}
    for head, by in held:
        if head.rank < len(sizes) and head.size == sizes[head.rank]:
            steps.setdefault(head.step, {}).setdefault(head.rank, []).append(by)
    complete = [step for step, files in steps.items() if len(files) == len(sizes)]
    if not complete:
        return None
    step = max(complete)
    near = {r: min(of, key=lambda p: (hosts[p] != hosts[r], p)) for r, of in steps[step].items()}
    return step, near


def octets(x: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU."""
    return x.reshape(-1).view(torch.uint8).numpy().data if x.numel() else memoryview(b"")


def key_of(settings: Mapping[str, Any]) -> str:
    """Return a text that stands for settings."""
    return hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:16]


def check_room(folder: Path, needed: int, flag: str) -> None:
    """Raise UserError unless the folder can be written and has so many bytes free. Files of earlier
    copies count as free."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = sum(path.stat().st_size for path in folder.iterdir() if NAME.fullmatch(path.name))
        free = shutil.disk_usage(folder).free + held
    except OSError as error:
        raise UserError(
            f"{flag} {folder}: cannot be written ({error.strerror}); choose another folder"
        ) from error
    if needed > free:
        raise UserError(
            f"{flag} {folder}: the copies of this host take {needed / 2**30:,.2f} GiB, and "
            f"{free / 2**30:,.2f} GiB are free; make the tmpfs larger (mount -o remount,size=...), "
            "choose another folder, or leave the copies out"
        )
