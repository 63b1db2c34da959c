"""A checkpoint on disk: its files, whether it is complete, and the checkpoints to keep. Nothing
here needs torch.

``checkpoints/step-00000100`` is written as ``step-00000100.part`` and renamed when it is complete.
So a reader sees a complete checkpoint or none. The last file written, ``meta.json``, lists the
other files with their sizes and CRC-32s.

Sizes are compared whenever a checkpoint is opened. Checksums need every byte, so they are compared
when a checkpoint is loaded or inspected. Without checksums a flipped byte of a
weight would go unnoticed.
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
from dtron.renamed import current

FORMAT = 3
REMEDY = "delete it to resume from the one before"
_CHUNK = 1 << 24  # bytes


def folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def target(run_dir: Path, step: int) -> Path:
    return folder(run_dir) / f"step-{step:08d}"


def whole(run_dir: Path) -> list[Path]:
    """Return the finished checkpoints of a run, oldest first."""
    return [file.parent for file in sorted(folder(run_dir).glob("step-*[0-9]/meta.json"))]


def newest(run_dir: Path) -> Path | None:
    """Return the newest finished checkpoint of a run."""
    return next(reversed(whole(run_dir)), None)


def checksum(file: Path) -> int:
    """Return the CRC-32 of a file's bytes."""
    found = 0
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            found = zlib.crc32(chunk, found)
    return found


def describe_files(files: Sequence[Path]) -> dict[str, list[int]]:
    """Return size and CRC-32 of each file by name, read back from the disk."""
    return {file.name: [file.stat().st_size, checksum(file)] for file in files}


def finish(part: Path, goal: Path, meta: dict[str, Any]) -> None:
    """Turn a written folder into the checkpoint: write ``meta.json``, then rename the folder."""
    with (part / "meta.json").open("w") as file:
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(goal, ignore_errors=True)
    part.rename(goal)
    opened = os.open(goal.parent, os.O_RDONLY)
    os.fsync(opened)  # so that the new name survives a crash of the machine
    os.close(opened)


def prune(run_dir: Path, keep: int, keep_every: int) -> list[Path]:
    """Delete old checkpoints and return the deleted paths. The last ``keep`` checkpoints stay (0:
    all stay). Checkpoints of steps that are multiples of ``keep_every`` stay too."""
    old = whole(run_dir)[:-keep] if keep else []
    gone = [p for p in old if not (keep_every and _step(p) % keep_every == 0)]
    for path in gone:
        (path / "meta.json").unlink()  # first: an interrupted rmtree leaves no valid checkpoint
        shutil.rmtree(path)
    return gone


def clear_parts(run_dir: Path) -> None:
    """Remove checkpoints that earlier processes left half-written."""
    for path in folder(run_dir).glob("step-*"):
        if path.suffix == ".part" or not (path / "meta.json").exists():
            shutil.rmtree(path, ignore_errors=True)


def read_meta(path: Path) -> dict[str, Any]:
    """Return the checkpoint's ``meta.json``. Raises UserError unless every file that it lists is
    present and has the listed size. The identity of an older version gets today's names."""
    try:
        meta = json.loads((path / "meta.json").read_text())
        files, version, identity = meta["files"], meta["format"], meta["identity"]
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
    return meta | {"identity": current(identity)}


def damaged(path: Path, meta: dict[str, Any], part: int = 0, parts: int = 1) -> list[str]:
    """Return the files whose bytes have changed since they were written. With several processes
    each process checks every ``parts``-th file, from file ``part`` on."""
    names = list(meta["files"])[part::parts]
    return [name for name in names if checksum(path / name) != meta["files"][name][1]]


def before(path: Path) -> Path | None:
    """Return the newest checkpoint before this one that is complete to the last byte."""
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
