"""Makes the notebook of a lab from its file and a text beside it.

The text is ``notebooks/lab<number>_<name>.py.txt``. It has cells of code and of Markdown, which
begin with ``# %%`` and ``# %% [markdown]`` (a line of Markdown is a comment). ``# %% file`` stands
where the student's file comes, a cell for each function. The cells before the text (its title, the
installation) and after it (the check) are the same in every lab."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

from dtron.course.labs import LABS, starting_file

INSTALL = """\
# A notebook service has no dtron. Name the copy of your course here: a wheel, or git+https://...
SOURCE = "dtron[course]"

import importlib.util
import subprocess
import sys

if importlib.util.find_spec("dtron") is None:
    subprocess.check_call([sys.executable, "-m", "pip", "install", "--quiet", SOURCE])"""
_MARK = re.compile(r"^# %%(.*)$", re.M)
_FIRST = re.compile(r"(Lab \d+: .+?)\. The page is\s+docs/course/([\w-]+\.md)")


@dataclass(frozen=True)
class Cell:
    """A cell of a notebook. ``name``: what a cell of the student's file
    defines."""

    kind: Literal["markdown", "code"]
    text: str
    name: str = ""
    student: bool = False


def notebook_name(number: int) -> str:
    return f"lab{number}_{LABS[number]}.ipynb"


def notebook_text(number: int) -> str:
    """Return the notebook of a lab, as the text of its file. It has no outputs."""
    cells = [_as_json(f"lab{number}-{i}", c) for i, c in enumerate(notebook_cells(number))]
    python = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": python, "language_info": {"name": "python"}}
    whole = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def notebook_cells(number: int) -> list[Cell]:
    """Return the cells of a lab's notebook."""
    file, name = starting_file(number), f"lab{number}_{LABS[number]}"
    found = _FIRST.search(ast.get_docstring(ast.parse(file)) or "")
    assert found is not None  # every lab's file names its lab and its page
    title = (
        f"# {found[1]}\n\nThe page of this lab is [docs/course/{found[2]}](../{found[2]}). Its "
        f"file is `{name}.py`: the functions here are the same, and so is the check."
    )
    text = (files("dtron.course") / "notebooks" / f"{name}.py.txt").read_text()
    check = f"check({number}, globals())"
    return [
        Cell("markdown", title),
        Cell("code", INSTALL),
        Cell("code", "from dtron.course.notebook import check, compare, play"),
        *own_cells(text, file),
        Cell("markdown", "Run this cell after each change. It says what is wrong first."),
        Cell("code", check),
    ]


def own_cells(text: str, file: str) -> Iterator[Cell]:
    """Yield the cells of a lab's text, with the student's ``file`` in its place."""
    _, *parts = _MARK.split(text)
    for mark, body in zip(parts[::2], parts[1::2], strict=True):
        match mark.strip():
            case "":
                yield Cell("code", body.strip())
            case "[markdown]":
                lines = (line.removeprefix("#").removeprefix(" ") for line in body.splitlines())
                yield Cell("markdown", "\n".join(lines).strip())
            case "file":
                yield from file_cells(file)
            case other:
                raise ValueError(f"a cell begins with # %%, and not with # %% {other}")


def file_cells(file: str) -> list[Cell]:
    """Return a lab's file in cells: one for each function, class and assignment, with the comments
    above it, and one for imports. The docstring of the file is left out."""
    lines = re.sub(r"  # noqa.*", "", file).splitlines()
    found: list[Cell] = []
    start = 0
    for node in ast.parse("\n".join(lines)).body:
        text = "\n".join(lines[start : node.end_lineno])
        start = node.end_lineno or start
        if isinstance(node, ast.Expr) and not found:
            continue  # the docstring
        name = _name(node)
        if found and not found[-1].name and not name:
            found[-1] = Cell("code", f"{found[-1].text}\n{text}", student=True)
        else:
            found.append(Cell("code", text.strip(), name, student=True))
    return found


def _name(node: ast.stmt) -> str:
    """Return the name that a statement gives; empty for an import."""
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return name
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
            return name
    return ""


def _as_json(identity: str, cell: Cell) -> dict:
    shown: dict = {"cell_type": cell.kind, "id": identity, "metadata": {}}
    shown["source"] = cell.text.splitlines(keepends=True)
    if cell.student:
        shown["metadata"] = {"tags": ["student"]}
    return shown if cell.kind == "markdown" else shown | {"execution_count": None, "outputs": []}
