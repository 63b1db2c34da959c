"""Reads the files of a run with one JSON object a line: ``metrics.jsonl`` and ``starts.jsonl``.

A run may be writing, or may have been killed while it wrote. So a line that is no object is passed
over, such as half a line at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from dtron.errors import UserError
from dtron.json_files import is_there, open_regular
from dtron.renamed import current

METRICS, STARTS = "metrics.jsonl", "starts.jsonl"
_LONGEST = 1 << 20  # bytes of a line that are read at once; a record has some hundred


def parse_objects(content: bytes) -> list[dict[str, Any]]:
    """Return the objects of lines, under the names of today."""
    found = []
    for line in content.splitlines():
        try:
            value = msgspec.json.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(current(value))
    return found


def each_object(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file, which is read line by line; an absent file has none. Raises
    UserError for a file that cannot be read."""
    if not is_there(path):
        return
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            while line := file.readline(_LONGEST):
                yield from parse_objects(line)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be read ({reason}); make it readable") from error


def each_step(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of the steps in a ``metrics.jsonl``, of any version of dtron."""
    whole = ("step", "tokens")
    return (x for x in each_object(path) if all(isinstance(x.get(name), int) for name in whole))
