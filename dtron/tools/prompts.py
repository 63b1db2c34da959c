"""The prompts of ``dtron generate``: from the command line, or from a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtron.errors import UserError
from dtron.json_files import decode, read_bytes


def read_prompts(texts: Sequence[str] | None, file: str | None) -> list[str]:
    """Return the prompts of ``--prompt`` and ``--prompts``. Raises UserError if there are none, and
    for a prompt that is no text.

    ``file``: has one prompt a line. A line of a .jsonl file is an object with the key "prompt".
        Empty lines are passed over."""
    found = list(texts or [])
    check_text(found)
    if file is not None:
        found += _lines(file)
    if not found:
        name = "--prompt" if file is None else f"--prompts {file}"
        raise UserError(f"{name}: there is no prompt; give --prompt TEXT")
    return found


def check_text(prompts: Sequence[str], flag: str = "--prompt") -> None:
    """Raise UserError for a prompt that is not text. Python keeps bytes of a command line that are
    no UTF-8 as half surrogate pairs."""
    for text in prompts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{flag} {text[:40]!a}: is not UTF-8 at character {error.start}; convert it"
            ) from error


def _lines(file: str) -> list[str]:
    check_text([file], "--prompts")
    data = read_bytes(Path(file))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompts {file}: is not UTF-8 at byte {error.start}; convert it"
        ) from error
    # Not splitlines, which ends a line at other characters too.
    lines = [(i, line.removesuffix("\r")) for i, line in enumerate(text.split("\n"), 1)]
    lines = [(i, line) for i, line in lines if line.strip()]
    if not file.endswith(".jsonl"):
        return [line for _, line in lines]
    return [_prompt_of(line, f"--prompts {file}, line {i}") for i, line in lines]


def _prompt_of(line: str, where: str) -> str:
    row = decode(line.encode(), dict[str, Any], where)
    if not isinstance(row.get("prompt"), str):
        raise UserError(f'{where}: has no text under the key "prompt"; add it')
    return row["prompt"]
