"""The numbers and code of the pages are those of the source."""

from __future__ import annotations

import re

import pytest
from hypothesis import settings

from dtron.schedules.__main__ import main
from tests.helpers.examples import examples
from tests.helpers.paths import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)


def python_block(containing: str) -> str:
    return next(code for language, code in BLOCKS if language == "python" and containing in code)


@pytest.mark.parametrize(
    ("containing", "file"),
    [("class MLP", "dtron/layers/mlp.py"), ("RULES: Rules", "dtron/rules.py")],
)
def test_code_shown_is_the_code(containing, file):
    assert python_block(containing) in (ROOT / file).read_text()


def test_the_schedule_shown_is_the_schedule():
    page = (ROOT / "docs" / "pipelining.md").read_text()
    (shown,) = re.findall(r"```python\n(.*?)```", page, re.S)
    assert shown in (ROOT / "dtron" / "schedules" / "one_f_one_b.py").read_text()


def test_the_comparison_shown_is_what_the_command_prints(capsys):
    assert main(["compare", "--stages", "8", "--microbatches", "32", "-o", "/dev/null"]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed]
    page = (ROOT / "docs" / "pipelining.md").read_text()
    assert len(cells) == 6 and all("| " + " | ".join(row) + " |" in page for row in cells)


def test_the_five_line_proof_runs():
    scope = {}  # the name is of no file: hypothesis reads the source of a file
    exec(compile(python_block("def test_my_layer"), "the five lines", "exec"), scope)
    settings(max_examples=examples(30))(scope["test_my_layer"])()


def test_the_two_commands_come_first():
    assert [code.strip() for _, code in BLOCKS[:2]] == [
        "pip install -e . && python train.py",
        "pip install -e '.[test]' && pytest",
    ]


def lines(*files: str) -> int:
    """The lines of files, with docstrings and comments."""
    return sum(len((ROOT / file).read_text().splitlines()) for file in files)


def library(part: str = "") -> int:
    """The lines of ``dtron/tools`` or ``dtron/course``, or of the rest of the package."""
    files = [str(p.relative_to(ROOT)) for p in (ROOT / "dtron").rglob("*.py")]
    programs = ("dtron/tools/", "dtron/course/")
    chosen = f"dtron/{part}/" if part else ""
    return lines(*(f for f in files if f.startswith(chosen or programs) == bool(part)))


def near(said: str, n: int) -> bool:
    """Whether a number on a page, such as 17,395, is within 5 % of the true number."""
    return abs(int(said.replace(",", "")) - n) <= 0.05 * n


STEP = re.compile(r"^\| \[.*\.py\)[^|]* \| (\d+) \|", re.M)  # a row of the reading order


def reading_order() -> list[tuple[list[str], str]]:
    """The rows of the page: files, and the stated number of lines."""
    page = (ROOT / "docs" / "reading-order.md").read_text()
    return [(re.findall(r"\]\(\.\./([\w/]+\.py)\)", row[0]), row[1]) for row in STEP.finditer(page)]


def test_the_size_said_is_the_size():
    (core,) = re.findall(r"The library has\s+([\d,]+)\s+lines", README)
    (tools,) = re.findall(r"have another\s+([\d,]+)\.", README)
    (course,) = re.findall(r"\(`dtron/course/`\)\s+have\s+([\d,]+)\.", README)
    assert (
        near(core, library()) and near(tools, library("tools")) and near(course, library("course"))
    )


def test_the_reading_order_has_the_lines_it_says():
    rows = reading_order()
    assert len(rows) >= 15
    wrong = [f for f, said in rows if abs(int(said) - lines(*f)) > max(10, 0.05 * lines(*f))]
    total = lines(*(file for files, _ in rows for file in files))
    page = (ROOT / "docs" / "reading-order.md").read_text()
    said = re.findall(r"([\d,]{5,})\s+lines", page) + re.findall(r"\): ([\d,]+) lines", README)
    assert not wrong and len(said) == 2 and all(near(n, total) for n in said)


def test_the_reading_is_an_afternoon():
    page = (ROOT / "docs" / "reading-order.md").read_text()
    (said, minutes) = re.search(r"([\d,]{5,}) lines.*?of (\d+) minutes", page, re.S).groups()
    assert near(minutes, int(said.replace(",", "")) / 20) and int(minutes) <= 5 * 60


ROW = re.compile(r"^\| \d \| \[[^\]]+\]\(([\w/-]+\.md)\) \| (\d+) \|", re.M)


def test_the_front_page_has_the_minutes_of_its_pages():
    """Words of prose, tables and code at 150 a minute."""
    index = (ROOT / "docs" / "index.md").read_text()
    _, *paths = re.split(r"^## I ", index, flags=re.M)
    assert [path.split()[0] for path in paths] == ["train", "teach", "fork"]
    for path in paths:
        rows = ROW.findall(path)
        assert len(rows) >= 6
        for page, minutes in rows:
            words = len((ROOT / "docs" / page).read_text().split())
            assert abs(int(minutes) - words / 150) <= 1, page


def test_a_size_that_has_changed_is_noticed():
    assert near("1,000", 1050) and not near("1,000", 1060) and not near("1,060", 1000)
