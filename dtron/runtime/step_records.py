"""Reads the files of a run with one JSON object a line: ``metrics.jsonl`` and ``starts.jsonl``.

A run may be writing, or may have been killed while it wrote. So a line that is no object is passed
over, such as half a line at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from dtron.json_files import is_there, read_bytes
from dtron.renamed import current

METRICS, STARTS = "metrics.jsonl", "starts.jsonl"
_LARGEST = 1 << 34  # bytes of metrics.jsonl, some hundred a step


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


def read_objects(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file; an absent file has none. Raises UserError for a file that
    cannot be read."""
    return parse_objects(read_bytes(path, _LARGEST)) if is_there(path) else []


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Return the records of the steps in a ``metrics.jsonl``, of any version of dtron."""
    whole = ("step", "tokens")
    return [x for x in read_objects(path) if all(isinstance(x.get(name), int) for name in whole)]
