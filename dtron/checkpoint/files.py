"""A checkpoint on disk: which files, whole or not, and which ones to keep. Nothing here needs
torch.

``checkpoints/step-00000100`` is written as ``step-00000100.part`` and renamed when all of it is
there: whoever looks sees a whole checkpoint or none. The last file written, ``meta.json``, lists
the others with their sizes and CRC-32s. Sizes are compared whenever a checkpoint is looked at; the
checksums, which need every byte, when one is loaded (a flipped byte of a weight is otherwise one
odd number among billions) or inspected.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtron.errors import UserError

FORMAT = 3
REMEDY = "delete it to resume from the one before"
_CHUNK = 1 << 24  # bytes


def folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def target(run_dir: Path, step: int) -> Path:
    return folder(run_dir) / f"step-{step:08d}"


def whole(run_dir: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return [file.parent for file in sorted(folder(run_dir).glob("step-*[0-9]/meta.json"))]


def newest(run_dir: Path) -> Path | None:
    """The newest finished checkpoint of a run."""
    return next(reversed(whole(run_dir)), None)


def checksum(file: Path) -> int:
    """CRC-32 of a file's bytes."""
    found = 0
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            found = zlib.crc32(chunk, found)
    return found


def describe_files(files: Sequence[Path]) -> dict[str, list[int]]:
    """Size and CRC-32 by name, read back from the disk."""
    return {file.name: [file.stat().st_size, checksum(file)] for file in files}


def finish(part: Path, goal: Path, meta: dict[str, Any]) -> None:
    """Make a written folder the checkpoint: ``meta.json`` last, then its name."""
    with (part / "meta.json").open("w") as file:
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(goal, ignore_errors=True)
    part.rename(goal)
    opened = os.open(
        goal.parent, os.O_RDONLY
    )  # so that the new name survives a crash of the machine too
    os.fsync(opened)
    os.close(opened)


def prune(run_dir: Path, keep: int, keep_every: int) -> list[Path]:
    """Delete all but the last ``keep`` checkpoints (0: all stay) and those of steps that
    ``keep_every`` divides; the paths deleted."""
    gone = (
        [p for p in whole(run_dir)[:-keep] if not (keep_every and _step(p) % keep_every == 0)]
        if keep
        else []
    )
    for path in gone:
        (path / "meta.json").unlink()  # no checkpoint any more, whatever interrupts the rest
        shutil.rmtree(path)
    return gone


def clear_parts(run_dir: Path) -> None:
    """Remove what earlier processes left half-written."""
    for path in folder(run_dir).glob("step-*"):
        if path.suffix == ".part" or not (path / "meta.json").exists():
            shutil.rmtree(path, ignore_errors=True)


def read_meta(path: Path) -> dict[str, Any]:
    """The checkpoint's ``meta.json``, with every file it lists present and of its size; ValueError
    otherwise."""
    try:
        meta = json.loads((path / "meta.json").read_text())
        files, version = meta["files"], meta["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no readable checkpoint ({error}); {REMEDY}") from error
    if version != FORMAT:
        raise UserError(
            f"{path}: format {version}, this version reads {FORMAT}; use the version that wrote it"
        )
    for name, (size, _) in files.items():
        file = path / name
        have = file.stat().st_size if file.is_file() else 0
        if have != size:
            raise UserError(
                f"{file}: has {have} of {size} bytes, the checkpoint is not whole; {REMEDY}"
            )
    return meta


def damaged(path: Path, meta: dict[str, Any], part: int = 0, parts: int = 1) -> list[str]:
    """The files whose bytes are not those that were written; of several processes each looks at its
    part."""
    names = list(meta["files"])[part::parts]
    return [name for name in names if checksum(path / name) != meta["files"][name][1]]


def before(path: Path) -> Path | None:
    """The newest checkpoint before this one that is whole to the last byte."""
    for other in reversed(whole(path.parent.parent)):
        if _step(other) < _step(path):
            try:
                if not damaged(other, read_meta(other)):
                    return other
            except ValueError:
                continue
    return None


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
