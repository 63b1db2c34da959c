"""A checkpoint on disk: where it is, whether it is complete, and the checkpoints to keep. Nothing
here needs torch.

``checkpoints/step-00000100`` is written as ``step-00000100.part`` and renamed when it is complete.
So a reader sees a complete checkpoint or none. meta.py describes its ``meta.json``.

A checkpoint is what its ``meta.json`` says, whatever its folder is called: a renamed or copied
checkpoint is found at its own step. Only folders that this program has named are ever deleted:
checkpoints beyond ``--keep``, and half-written ones. The checkpoint that was saved last is never
deleted.

Sizes are compared whenever a checkpoint is opened. Checksums need every byte, so they are compared
when a checkpoint is loaded or inspected. Without checksums a flipped byte of a weight would go
unnoticed.
"""

from __future__ import annotations

import os
import re
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dtron.checkpoint.meta import (
    META,
    REMEDY,
    FileMeta,
    Meta,
    decode_meta,
    encode_meta,
    peek_step,
)
from dtron.errors import UserError
from dtron.json_files import is_there, open_regular, read_bytes

_CHUNK = 1 << 24  # bytes
_LARGEST_META = 1 << 32  # bytes
_NAME = re.compile(r"step-(\d{8,})")
_HALF_WRITTEN = re.compile(r"step-\d{8,}(\.old)?\.part")


class Found(NamedTuple):
    """A checkpoint in a run's directory.

    ``named``: whether it has the name that this program gives to a checkpoint of this step."""

    step: int
    named: bool
    path: Path


def folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def target(run_dir: Path, step: int) -> Path:
    return folder(run_dir) / f"step-{step:08d}"


def found(run_dir: Path) -> list[Found]:
    """Return the finished checkpoints of a run, by step. Raises UserError if one of the folders may
    not be read, because a run that saw nothing there would begin anew."""
    if not is_there(folder(run_dir)):
        return []
    try:
        names = sorted(os.listdir(folder(run_dir)))
    except OSError as error:
        raise UserError(
            f"{folder(run_dir)}: cannot be listed ({error.strerror}), so nothing says whether it "
            "holds checkpoints; give this user access, or choose another --run-dir"
        ) from error
    out = []
    for name in names:
        path = folder(run_dir) / name
        if _HALF_WRITTEN.fullmatch(name) or not is_there(path / META):
            continue
        if not (path / META).is_file():
            continue
        match = _NAME.fullmatch(name)
        by_name = int(match[1]) if match else None
        step = peek_step(path)
        if step is not None:
            out.append(Found(step, step == by_name, path))
        elif by_name is not None:  # damaged, which the reader will say if it is chosen
            out.append(Found(by_name, False, path))
    return sorted(out)


def whole(run_dir: Path) -> list[Path]:
    """Return the finished checkpoints of a run, oldest first."""
    return [one.path for one in found(run_dir)]


def newest(run_dir: Path) -> Path | None:
    """Return the newest finished checkpoint of a run."""
    return next(reversed(whole(run_dir)), None)


def checksum(file: Path) -> int:
    """Return the CRC-32 of a file's bytes."""
    out = 0
    with os.fdopen(open_regular(file, follow=False), "rb") as opened:
        while chunk := opened.read(_CHUNK):
            out = zlib.crc32(chunk, out)
    return out


def describe_files(files: Sequence[Path]) -> dict[str, FileMeta]:
    """Return size and CRC-32 of each file by name, read back from the disk."""
    return {file.name: FileMeta(file.stat().st_size, checksum(file)) for file in files}


def finish(part: Path, goal: Path, meta: Meta) -> None:
    """Turn a written folder into the checkpoint: write ``meta.json``, then rename the folder. An
    older checkpoint of the same step is replaced; any other folder of this name is an error."""
    with (part / META).open("wb") as file:
        file.write(encode_meta(meta))
        file.flush()
        os.fsync(file.fileno())
    old = None
    if goal.exists():
        if any(goal.iterdir()) and peek_step(goal) is None:
            raise OSError(0, f"{goal.name} is there already, and is no checkpoint")
        old = _set_aside(goal)
    part.rename(goal)
    opened = os.open(goal.parent, os.O_RDONLY)
    os.fsync(opened)  # so that the new name survives a crash of the machine
    os.close(opened)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _set_aside(path: Path) -> Path:
    """Give a folder the name of a half-written one, so that no interrupted deletion leaves a
    checkpoint that lacks files."""
    aside = path.with_name(path.name + ".old.part")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    return aside


def prune(run_dir: Path, saved: int, keep: int, keep_every: int) -> list[Path]:
    """Delete old checkpoints and return the deleted paths. The last ``keep`` checkpoints up to the
    step ``saved`` stay (0: all stay). Checkpoints of steps that are multiples of ``keep_every``
    stay too, and so do renamed ones."""
    own = [
        one
        for one in found(run_dir)
        if one.named and one.step <= saved and not one.path.is_symlink()
    ]
    old = own[:-keep] if keep else []
    gone = [one.path for one in old if not (keep_every and one.step % keep_every == 0)]
    for path in gone:
        shutil.rmtree(_set_aside(path))
    return gone


def clear_parts(run_dir: Path) -> None:
    """Remove checkpoints that earlier processes left half-written."""
    for path in folder(run_dir).glob("step-*.part"):
        if _HALF_WRITTEN.fullmatch(path.name) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def read_meta(path: Path) -> Meta:
    """Return the checkpoint's ``meta.json``. Raises UserError unless every file that it lists is
    present and has the listed size."""
    meta = decode_meta(read_bytes(path / META, _LARGEST_META, follow=False), path)
    for name, listed in meta.files.items():
        file = path / name
        have = file.stat().st_size if file.is_file() and not file.is_symlink() else 0
        if have != listed.size:
            raise UserError(
                f"{file}: has {have} of {listed.size} bytes, so the checkpoint is not whole; "
                f"{REMEDY}"
            )
    return meta


def damaged(path: Path, meta: Meta, part: int = 0, parts: int = 1) -> list[str]:
    """Return the names of the files whose checksum differs from the listed one. Of several
    processes each process checks every ``parts``-th file, from file ``part`` on."""
    names = list(meta.files)[part::parts]
    return [name for name in names if checksum(path / name) != meta.files[name].crc32]


def before(path: Path) -> Path | None:
    """Return the newest checkpoint before this one that is complete to the last byte."""
    known = {one.path: one.step for one in found(path.parent.parent)}
    for other, step in reversed(known.items()):
        if step < known.get(path, 0):
            try:
                if not damaged(other, read_meta(other)):
                    return other
            except ValueError:
                continue
    return None
