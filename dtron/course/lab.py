"""A lab of the course: the parts that are checked, the points of each part, and one line for each
mistake."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

LONGEST = 2000  # characters of a line


class Wrong(Exception):
    """A mistake in a student's file. The message is one line: what is wrong, and where.

    ``share``: the share of the part's points that the file still gets."""

    def __init__(self, line: str, share: float = 0.0):
        super().__init__(line)
        self.share = share


@dataclass(frozen=True)
class Part:
    """A part of a lab.

    ``check``: takes the student's module. Raises ``Wrong``, or any exception of the student's code.
    ``hidden``: its cases are not those of the lab's page."""

    name: str
    points: int
    check: Callable[[ModuleType], None]
    hidden: bool = False


@dataclass(frozen=True)
class Lab:
    """A lab. The student's file is ``lab<number>_<name>.py``."""

    number: int
    name: str
    parts: tuple[Part, ...]

    @property
    def file(self) -> str:
        return f"lab{self.number}_{self.name}.py"


@dataclass(frozen=True)
class PartResult:
    """The points of a part, and the line that says what is wrong (empty: nothing)."""

    name: str
    points: int
    of: int
    hidden: bool
    line: str = ""


@dataclass(frozen=True)
class LabResult:
    """The result of a lab: one entry for each part."""

    lab: int
    name: str
    parts: tuple[PartResult, ...]

    @property
    def points(self) -> int:
        return sum(p.points for p in self.parts)

    @property
    def of(self) -> int:
        return sum(p.of for p in self.parts)

    @property
    def line(self) -> str:
        """What is wrong first; empty if all is right."""
        return next((f"{p.name}: {p.line}" for p in self.parts if p.line), "")

    def __str__(self) -> str:
        what = self.line or "all is right"
        return f"lab {self.lab} ({self.name}): {self.points} of {self.of} points; {what}"


Place = Callable[[FrameType, int], str | None]
"""Names a line of a student's code: from its frame and its number. None: code of others."""


def check_lab(lab: Lab, folder: Path) -> LabResult:
    """Check the student's file of a lab. Every part is checked, also after a mistake."""
    path = folder / lab.file
    if not path.is_file():
        return failed(lab, f"{folder} has no {lab.file}")
    path = path.resolve()  # as Python's tracebacks have it
    try:
        module = load(path)
    except SyntaxError as error:
        if error.filename == str(path):
            return failed(lab, f"line {error.lineno} of {path.name} is no Python: {error.msg}")
        return failed(lab, describe(error, _lines_of(path)))
    except (Exception, SystemExit) as error:
        return failed(lab, describe(error, _lines_of(path)))
    return check_parts(lab, module, _lines_of(path))


def check_parts(lab: Lab, module: ModuleType, place: Place) -> LabResult:
    """Check the answers of a student's module. ``place`` names its lines."""
    return LabResult(lab.number, lab.name, tuple(_check_part(p, module, place) for p in lab.parts))


def _lines_of(path: Path) -> Place:
    def place(frame: FrameType, line: int) -> str | None:
        return f"line {line} of {path.name}" if frame.f_code.co_filename == str(path) else None

    return place


def failed(lab: Lab, line: str) -> LabResult:
    """Return a result without points: no part could be checked."""
    parts = tuple(PartResult(p.name, 0, p.points, p.hidden, line) for p in lab.parts)
    return LabResult(lab.number, lab.name, parts)


def _check_part(part: Part, module: ModuleType, place: Place) -> PartResult:
    points, line = part.points, ""
    try:
        part.check(module)
    except Wrong as wrong:
        points, line = int(part.points * wrong.share + 1e-9), str(wrong)
    except (Exception, SystemExit) as error:
        points, line = 0, describe(error, place)
    return PartResult(part.name, points, part.points, part.hidden, one_line(line))


def one_line(text: str) -> str:
    """Return a text in one line. A message of a student's code may have megabytes; its end is cut
    off."""
    line = " ".join(text[: 4 * LONGEST].split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


def load(path: Path) -> ModuleType:
    """Run a student's file as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"student_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # ``path`` is a Python file
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look there
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = writes
    return module


def describe(error: BaseException, place: Place) -> str:
    """Say in one line what has happened in a student's code, and in which line of it."""
    frames = traceback.walk_tb(error.__traceback__)
    found = [(f.f_code.co_name, at) for f, line in frames if (at := place(f, line))]
    text = one_line(str(error))
    if isinstance(error, NotImplementedError) and found:
        return f"{found[-1][0]} is not written yet ({found[-1][1]})"
    where = found[-1][1] if found else "an answer has a wrong form"
    what = type(error).__name__
    return f"{where}: {what}: {text}" if text else f"{where}: {what}"


def answer(module: ModuleType, name: str) -> Any:
    """Return a name of the student's module. Raises Wrong if the module lacks the name."""
    if not hasattr(module, name):
        raise Wrong(f"the file has no {name}; write it, with this name")
    return getattr(module, name)


def caught(test: Callable[..., Any], right: Sequence[Any], mutants: Sequence[Any]) -> None:
    """Score a student's test: it must pass on everything that is right, and fail on each mutant.
    Raises Wrong with the share of the mutants that fail.

    ``right``, ``mutants``: tuples of the test's arguments."""
    for args in right:
        try:
            test(*args)
        except NotImplementedError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())
            raise Wrong(f"your test fails on a solution that is right: {text}") from error
    passed = sum(_passes(test, args) for args in mutants)
    if passed:
        n = len(mutants)
        line = f"your test catches {n - passed} of {n} mutants"
        raise Wrong(f"{line}; try it on more cases", share=(n - passed) / n)


def _passes(test: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    try:
        test(*args)
    except Exception:
        return False
    return True
