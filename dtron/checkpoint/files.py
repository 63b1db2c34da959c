"""The checkpoints of a run: where they are, whether they are whole, and which to keep. Nothing here
needs torch.

``place`` is the run's directory, or the place in an object store that the run has chosen for its
checkpoints (storage.py). A checkpoint is ``place/checkpoints/step-00000100``. A reader sees a whole
checkpoint or none. meta.py describes its ``meta.json``.

A checkpoint is what its ``meta.json`` says, whatever its folder is called: a renamed or copied
checkpoint is found at its own step. Only folders that this program has named are ever deleted:
checkpoints beyond ``--keep``, and half-written ones. The checkpoint that was saved last is never
deleted.

Sizes are compared whenever a checkpoint is opened. Checksums need every byte, so they are compared
when a checkpoint is loaded or inspected. Without checksums a flipped byte of a weight would go
unnoticed.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from dtron.checkpoint.meta import META, REMEDY, Meta, decode_meta, parse_head
from dtron.checkpoint.storage import AnyPath, storage_of
from dtron.errors import UserError

FOLDER = "checkpoints"  # in a run's directory, or in its store
_LARGEST_META = 1 << 32  # bytes
_NAME = re.compile(r"step-(\d{8,})")


class Found(NamedTuple):
    """A checkpoint of a run.

    ``named``: whether it has the name that this program gives to a checkpoint of this step, and is
        no link.
    ``format``: of its files; 0: unknown."""

    step: int
    named: bool
    path: AnyPath
    format: int


def folder(place: AnyPath) -> AnyPath:
    return place / FOLDER


def target(place: AnyPath, step: int) -> AnyPath:
    return folder(place) / f"step-{step:08d}"


def found(place: AnyPath) -> list[Found]:
    """Return the finished checkpoints of a run, by step. Raises UserError if one of the folders may
    not be read, because a run that saw nothing there would begin anew."""
    storage = storage_of(place)
    try:
        heads = storage.heads(folder(place))
    except OSError as error:
        raise UserError(
            f"{folder(place)}: cannot be listed ({error.strerror}), so nothing says whether it "
            "holds checkpoints; give this user access, or choose another --run-dir"
        ) from error
    out = []
    for name, data in heads.items():
        path, head = folder(place) / name, parse_head(data)
        match = _NAME.fullmatch(name)
        by_name = int(match[1]) if match else None
        if head is not None:
            named = head[1] == by_name and not storage.is_link(path)
            out.append(Found(head[1], named, path, head[0]))
        elif by_name is not None:  # damaged, which the reader will say if it is chosen
            out.append(Found(by_name, False, path, 0))
    return sorted(out)


def whole(place: AnyPath) -> list[AnyPath]:
    """Return the finished checkpoints of a run, oldest first."""
    return [one.path for one in found(place)]


def newest(place: AnyPath) -> AnyPath | None:
    """Return the newest finished checkpoint of a run."""
    return next(reversed(whole(place)), None)


def prune(place: AnyPath, saved: int, keep: int, keep_every: int) -> list[AnyPath]:
    """Delete old checkpoints and return the deleted ones. The last ``keep`` checkpoints up to the
    step ``saved`` stay (0: all stay). Checkpoints of steps that are multiples of ``keep_every``
    stay too, and so do renamed ones."""
    own = [one for one in found(place) if one.named and one.step <= saved]
    old = own[:-keep] if keep else []
    gone = [one.path for one in old if not (keep_every and one.step % keep_every == 0)]
    for path in gone:
        storage_of(place).remove(path)
    return gone


def clear_parts(place: AnyPath) -> None:
    """Remove checkpoints that earlier processes left half-written."""
    storage_of(place).clear(folder(place))


def read_meta(path: AnyPath) -> Meta:
    """Return the checkpoint's ``meta.json``. Raises UserError unless every file that it lists is
    present and has the listed size."""
    storage = storage_of(path)
    meta = decode_meta(storage.read(path / META, _LARGEST_META), path)
    try:
        sizes = storage.sizes(path, meta.files)
    except OSError as error:
        raise _unreadable(path, error) from error
    for name, listed in meta.files.items():
        if (have := sizes.get(name, 0)) != listed.size:
            raise UserError(
                f"{path / name}: has {have} of {listed.size} bytes, so the checkpoint is not "
                f"whole; {REMEDY}"
            )
    return meta


def damaged(path: AnyPath, meta: Meta, part: int = 0, parts: int = 1) -> list[str]:
    """Return the names of the files whose checksum differs from the listed one. Of several
    processes each process checks every ``parts``-th file, from file ``part`` on."""
    names, storage = list(meta.files)[part::parts], storage_of(path)
    try:
        return [name for name in names if storage.checksum(path / name) != meta.files[name].crc32]
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: AnyPath, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror}); make it readable")


def before(path: AnyPath) -> AnyPath | None:
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
