"""The notebooks of the labs: made from the labs' files, without outputs and without answers. With
the reference solution a notebook has all points."""

from __future__ import annotations

import ast
import builtins
import re
import sys
from types import ModuleType

import pytest

from dtron.course.__main__ import main
from dtron.course.labs import LABS, lab, starting_file
from dtron.course.notebook import check, checked, compare, drawn, play
from dtron.course.notebook_files import (
    Cell,
    file_cells,
    notebook_cells,
    notebook_name,
    notebook_text,
    own_cells,
)
from dtron.errors import UserError
from tests.course.test_labs import STARTING
from tests.course.wrong.mistake import SOLUTIONS
from tests.helpers.paths import ROOT

FOLDER = ROOT / "docs" / "course" / "notebooks"
WIDGETS = "ipywidgets"


@pytest.fixture
def notebook(monkeypatch):
    """The module whose names are those of a notebook."""
    module = ModuleType("a_notebook")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look there
    return module


def run(cells: list[Cell], module: ModuleType) -> None:
    for i, cell in enumerate(cells):
        if cell.kind == "code":
            exec(compile(cell.text, f"cell {i}", "exec"), vars(module))


def solved(number: int) -> list[Cell]:
    """The cells of a notebook with the reference solution in place of the student's functions."""
    solution = file_cells((SOLUTIONS / lab(number).file).read_text())
    own = {c.name: c for c in solution if c.name}
    cells = notebook_cells(number)
    there = {c.name for c in cells if c.student}
    more = [
        c for c in solution if not c.name or c.name not in there
    ]  # imports and helper functions
    first = next(i for i, c in enumerate(cells) if c.student)
    cells[first + 1 : first + 1] = more
    return [own.get(c.name, c) if c.name else c for c in cells]


@pytest.mark.parametrize("number", LABS)
def test_a_notebook_with_the_solution_has_all_points(number, notebook, capsys):
    """Every cell runs, with its pictures."""
    pytest.importorskip(WIDGETS)
    run(solved(number), notebook)
    said = capsys.readouterr().out
    points = sum(p.points for p in lab(number).parts)
    assert f"({LABS[number]}): {points} of {points} points; all is right" in said
    assert "write your prediction first" in said


@pytest.mark.parametrize("number", LABS)
def test_an_unedited_notebook_says_the_line_of_the_file(number, notebook, capsys):
    run([c for c in notebook_cells(number) if c.student], notebook)
    check(number, vars(notebook))
    line, *parts = capsys.readouterr().out.splitlines()
    assert without_place(line.partition("points; ")[2]) == without_place(STARTING[number])
    assert len(parts) == len(lab(number).parts)


def without_place(line: str) -> str:
    return re.sub(r"line \d+ of (the cell with )?[\w.]+", "line", line)


@pytest.mark.parametrize("number", LABS)
def test_the_notebook_of_the_docs_is_current(number):
    text = (FOLDER / notebook_name(number)).read_text()
    assert text == notebook_text(number), "run python docs/draw/notebooks.py"


def test_there_is_a_notebook_of_each_lab_and_no_other():
    assert {p.name for p in FOLDER.iterdir()} == {notebook_name(n) for n in LABS}


def test_a_notebook_is_well_formed_and_has_no_outputs():
    """All in one test, because its import takes seconds."""
    nbformat = pytest.importorskip("nbformat")
    for number in LABS:
        found = nbformat.reads(notebook_text(number), as_version=nbformat.NO_CONVERT)
        nbformat.validate(found)
        code = [c for c in found.cells if c.cell_type == "code"]
        assert not any(c.outputs or c.execution_count for c in code)


@pytest.mark.parametrize("number", LABS)
def test_a_notebook_has_an_idea_a_picture_predictions_and_the_file(number):
    cells = notebook_cells(number)
    code = "\n".join(c.text for c in cells if c.kind == "code")
    assert code.count("play(") >= 1 and code.count("guess = None") >= 2
    assert code.count("compare(guess, ") == code.count("guess = None")
    assert [c.text for c in cells if c.student] == [
        c.text for c in file_cells(starting_file(number))
    ]
    (page,) = set(re.findall(r"\]\(\.\./([\w-]+\.md)\)", cells[0].text))
    assert page in starting_file(number) and (ROOT / "docs" / "course" / page).is_file()
    assert lab(number).file in cells[0].text


NAME = re.compile(r"`([A-Za-z_]\w*)`")


def strangers(cells: list[Cell], known: str) -> set[str]:
    """The names in the prose of a notebook that are neither in its code nor in ``known``."""
    code = " ".join(c.text for c in cells if c.kind == "code") + known
    names = {n for c in cells if c.kind == "markdown" for n in NAME.findall(c.text)}
    return {n for n in names if not re.search(rf"\b{n}\b", code)}


@pytest.mark.parametrize("number", LABS)
def test_the_prose_names_what_is_in_the_notebook_or_on_the_page(number):
    cells = notebook_cells(number)
    (page,) = set(re.findall(r"\]\(\.\./([\w-]+\.md)\)", cells[0].text))
    assert strangers(cells, (ROOT / "docs" / "course" / page).read_text()) == set()
    assert strangers([Cell("markdown", "`no_such_name`")], "such") == {"no_such_name"}


def defined(text: str) -> set[str]:
    """The names that a program gives."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


@pytest.mark.parametrize("number", LABS)
def test_no_cell_gives_a_name_of_the_student(number):
    """Otherwise a cell that is run again would replace an answer."""
    cells = [c for c in notebook_cells(number) if c.kind == "code"]
    given = set().union(*(defined(c.text) for c in cells if not c.student))
    student = {c.name for c in cells if c.name}
    assert not given & student and not given & {*dir(builtins)}


def test_a_mistake_in_a_cell_has_its_line_in_the_cell(notebook):
    text = starting_file(9).replace(
        "raise NotImplementedError", "return rows // columns * 0 if columns < 5 else 1 / 0", 1
    )
    run(file_cells(text), notebook)
    first = checked(9, vars(notebook)).parts[0]
    assert first.line == "line 3 of the cell with cost: ZeroDivisionError: division by zero"


def test_a_prediction_is_compared_and_not_given_away(capsys):
    for guess in (None, 4, 3):
        compare(guess, 4)
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "write your prediction first" and second == "right: 4"
    assert third == "it is 4, and you predicted 3"


def test_a_control_moves_the_picture():
    pytest.importorskip(WIDGETS)
    seen = []

    def view(a, b):
        seen.append((a, b))
        return f"<svg>{a} {b}</svg>"

    box = play(view, a=(1, 2), b=(("x", "y"), ()))
    controls, picture = box.children
    assert "1 ('x', 'y')" in picture.value
    controls.children[0].value = 2
    assert "2 ('x', 'y')" in picture.value and len(seen) == 2
    assert controls.children[1].options[1][0] == "(none)"


def test_values_that_do_not_fit_are_said_in_the_place_of_the_picture():
    def view(a):
        raise UserError(f"{a}: <no>; take 2")

    assert drawn(view, {"a": 1}) == "<p>1: &lt;no&gt;; take 2</p>"


def test_a_students_folder_has_notebooks_if_asked(tmp_path, capsys):
    assert main(["start", str(tmp_path / "mine"), "--notebooks"]) == 0
    names = {p.name for p in (tmp_path / "mine").glob("*.ipynb")}
    assert names == {notebook_name(n) for n in LABS}
    with pytest.raises(UserError, match="name an empty folder"):
        main(["start", str(tmp_path / "mine"), "--notebooks"])


def test_a_cell_of_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="not with # %% code"):
        list(own_cells("# %% code\na = 1\n", ""))


@pytest.mark.slow
@pytest.mark.parametrize("number", LABS)
def test_a_notebook_runs_in_a_kernel(number):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    found = nbformat.reads(notebook_text(number), as_version=4)
    nbclient.NotebookClient(found, timeout=300).execute()
    said = "".join(o.get("text", "") for o in found.cells[-1].outputs).splitlines()[0]
    assert without_place(said.partition("points; ")[2]) == without_place(STARTING[number])
