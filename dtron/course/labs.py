"""The list of labs, and the folder of a student."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from dtron.course.lab import Lab
from dtron.errors import UserError

LABS = {
    0: "one_device",
    1: "placements",
    2: "missing_all_reduce",
    3: "zero",
    4: "tensor_parallelism",
    5: "schedules",
    6: "ring_attention",
    7: "experts",
    8: "numbers",
    9: "optimizers",
    10: "speed",
    11: "own_layer",
}
"""The labs that exist, by number; the module of a lab is ``dtron.course.lab<number>_<name>``."""

README = """\
# The course

Each file is a lab. Read its page in docs/course, write what is missing, and check it:

    dtron course check 1

Take the labs in this order:

"""


def lab(number: int) -> Lab:
    """Import a lab. Raises UserError if there is no such lab, and if it needs a package that is not
    installed."""
    if number not in LABS:
        numbers = ", ".join(map(str, LABS))
        raise UserError(f"lab {number}: there is no such lab; the labs are {numbers}")
    try:
        return importlib.import_module(f"dtron.course.lab{number}_{LABS[number]}").LAB
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise UserError(
            f"lab {number}: its check needs the package hypothesis; pip install 'dtron[test]'"
        ) from error


def start(folder: Path, more: Mapping[str, str] | None = None) -> list[str]:
    """Write the files of a student into a folder and return their names. Raises UserError if the
    folder has one of the files: a student's work is never overwritten.

    ``more``: further files: names and texts."""
    texts = {f"lab{n}_{name}.py": starting_file(n) for n, name in LABS.items()}
    texts["README.md"] = README + "".join(f"- `{name}`\n" for name in texts)
    texts |= more or {}
    for name in texts:
        if (folder / name).exists():
            raise UserError(f"{folder}: has {name} already; name an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return list(texts)


def starting_file(number: int) -> str:
    """Return the file of a lab as a student gets it."""
    return (files("dtron.course") / "files" / f"lab{number}_{LABS[number]}.py.txt").read_text()
