"""``dtron course``: the labs of docs/course.

dtron course start my-course
dtron course check 1 --dir my-course
dtron course grade submissions/* --json grades.json
dtron course rubric
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from dtron.runtime.exit import before_imports

    before_imports()

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.table import Table

from dtron.course.grade import Grade, Limits, grade
from dtron.course.lab import Lab, check_lab
from dtron.course.labs import LABS, lab, start
from dtron.course.notebook_files import notebook_name, notebook_text
from dtron.errors import UserError
from dtron.runtime.exit import Parser, run_cli
from dtron.tools.console import wide_console


def start_course(o: Namespace) -> int:
    """Make the folder of a student."""
    more = {notebook_name(n): notebook_text(n) for n in LABS} if o.notebooks else {}
    names = start(Path(o.dir), more)
    print(f"{o.dir}: {', '.join(names)}")
    return 0


def check(o: Namespace) -> int:
    """Check one lab. Returns 1 if something is wrong."""
    torch.set_num_threads(1)
    result = check_lab(lab(o.lab), _folder(o.dir))
    print(result)
    return 1 if result.line else 0


def grade_all(o: Namespace) -> int:
    """Grade many folders."""
    torch.set_num_threads(1)
    folders, labs = [_folder(d) for d in o.dir], [lab(n) for n in o.labs]
    limits = Limits(o.seconds, o.memory_gib << 30)
    grades = grade(folders, labs, o.jobs, limits)
    if o.json:
        try:
            Path(o.json).write_text(json.dumps([as_json(g) for g in grades], indent=1) + "\n")
        except OSError as error:
            why = f"cannot be written ({error.strerror}); choose another"
            raise UserError(f"--json {o.json}: {why}") from error
    wide_console().print(table(grades))
    for line in first_mistakes(grades):
        print(line)
    return 0


def print_rubric(o: Namespace) -> int:
    """Print the parts of labs with their points."""
    labs = [lab(n) for n in o.labs]
    wide_console().print(rubric(labs))
    return 0


def rubric(labs: Sequence[Lab]) -> Table:
    """Return a row for each part of each lab. The JSON of a grade has the points of the same
    parts."""
    grid = Table()
    for name in ("lab", "part", "points", "cases"):
        grid.add_column(name, justify="right" if name in ("lab", "points") else "left")
    for made in labs:
        grid.add_section()
        for part in made.parts:
            cases = "hidden" if part.hidden else "of the page"
            grid.add_row(str(made.number), part.name, str(part.points), cases)
        grid.add_row(str(made.number), made.name, str(sum(p.points for p in made.parts)), "all")
    return grid


def as_json(g: Grade) -> dict:
    """Return a grade as JSON: points, and the rubric of each lab with the line of each part."""
    labs = [{"points": r.points, "of": r.of, **asdict(r)} for r in g.labs]
    return {"folder": g.folder, "points": g.points, "of": g.of, "labs": labs}


def table(grades: Sequence[Grade]) -> Table:
    """Return a row for each submission: the points of each lab and of all."""
    grid = Table(title="points of each lab")
    grid.add_column("submission", overflow="fold", min_width=10)
    for r in grades[0].labs:
        grid.add_column(str(r.lab), justify="right", no_wrap=True)
    grid.add_column("sum", justify="right", no_wrap=True)
    for g in grades:
        row = (g.folder, *(str(r.points) for r in g.labs), str(g.points))
        grid.add_row(*(cell.replace("[", r"\[") for cell in row))
    grid.add_section()
    grid.add_row("all points", *(str(r.of) for r in grades[0].labs), str(grades[0].of))
    return grid


def first_mistakes(grades: Sequence[Grade]) -> list[str]:
    """Return one line for each submission that is not right: its first mistake."""
    wrong = ((g.folder, next((r for r in g.labs if r.line), None)) for g in grades)
    return [f"{folder}: lab {r.lab}: {r.line}" for folder, r in wrong if r is not None]


def _folder(name: str) -> Path:
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(f"{name}: is no folder; make one with dtron course start {name}")
    return folder


def positive(text: str) -> int:
    n = int(text)
    if n < 1:
        raise ValueError
    return n


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def parser() -> Parser:
    made = Parser(prog="dtron course", description="The labs of docs/course.")
    commands = made.add_subparsers(dest="command", required=True, parser_class=Parser)
    one = commands.add_parser("start", help="make a student's folder")
    one.add_argument("dir", metavar="DIR")
    one.add_argument("--notebooks", action="store_true", help="also a notebook of each lab")
    one = commands.add_parser("check", help="check one lab, and say what is wrong in one line")
    one.add_argument("lab", type=int, metavar="N", help=f"one of {', '.join(map(str, LABS))}")
    one.add_argument("--dir", default=".", help="the student's folder (this one)")
    one = commands.add_parser("rubric", help="print the parts of each lab, with their points")
    _add_labs(one)
    one = commands.add_parser("grade", help="grade many folders")
    one.add_argument("dir", nargs="+", metavar="DIR")
    _add_labs(one)
    text = "submissions that are checked at once (2)"
    one.add_argument("--jobs", type=positive, default=2, metavar="N", help=text)
    text = "CPU seconds for one lab of one submission (60)"
    one.add_argument("--seconds", type=positive, default=60, metavar="N", help=text)
    text = "memory for one lab of one submission (4)"
    one.add_argument("--memory-gib", type=positive, default=4, metavar="N", help=text)
    one.add_argument("--json", default="", metavar="FILE", help="also write the results here")
    return made


def _add_labs(parser: ArgumentParser) -> None:
    text = "labs, as 1,2 (all)"
    parser.add_argument("--labs", type=numbers, default=list(LABS), metavar="N,N", help=text)


def main(argv: Sequence[str]) -> int:
    o = parser().parse_args(list(argv))
    commands = {"start": start_course, "check": check, "grade": grade_all, "rubric": print_rubric}
    return commands[o.command](o)


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
