"""``dtron course``: the folder of a student, the check of one lab, and the grading of many
folders."""

from __future__ import annotations

import io
import json
import os
import re
import select
import sys

import pytest
from rich.console import Console

from dtron.course.__main__ import main, table
from dtron.course.grade import Grade, Limits, grade
from dtron.course.lab import LONGEST, check_lab
from dtron.course.labs import LABS, lab
from dtron.errors import UserError
from tests.course.wrong.mistake import SOLUTIONS

FIRST = lab(1)
SMALL = Limits(seconds=1, memory=4 << 30)


def submission(folder, text):
    folder.mkdir()
    (folder / FIRST.file).write_text(text)
    return folder


def line(folder, limits=SMALL):
    (only,) = grade([folder], [FIRST], 1, limits)
    return only.labs[0].line


def test_a_folder_has_every_file_and_is_never_overwritten(tmp_path, capsys):
    assert main(["start", str(tmp_path / "mine")]) == 0
    names = {p.name for p in (tmp_path / "mine").iterdir()}
    assert names == {"README.md", *(lab(n).file for n in LABS)}
    readme = (tmp_path / "mine" / "README.md").read_text()
    assert all(lab(n).file in readme for n in LABS)
    with pytest.raises(UserError, match="has lab0_one_device.py already; name an empty folder"):
        main(["start", str(tmp_path / "mine")])


def test_a_check_is_one_line_and_a_code(tmp_path, capsys):
    assert main(["check", "1", "--dir", str(SOLUTIONS)]) == 0
    assert main(["check", "1", "--dir", str(tmp_path)]) == 1
    right, wrong = capsys.readouterr().out.splitlines()
    assert right == "lab 1 (placements): 10 of 10 points; all is right"
    assert wrong.endswith("has no lab1_placements.py")


def test_a_check_in_the_folder_names_the_line(tmp_path, monkeypatch, capsys):
    """A folder's name that is not absolute."""
    assert main(["start", str(tmp_path / "labs")]) == 0
    monkeypatch.chdir(tmp_path / "labs")
    capsys.readouterr()
    main(["check", "0"])
    assert "matmuls is not written yet (line" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["check", "99"], "lab 99: there is no such lab; the labs are 0, 1, 2"),
        (["check", "1", "--dir", "nowhere"], "nowhere: is no folder; make one with dtron course"),
        (["grade", ".", "--json", "nowhere/a"], "--json nowhere/a: cannot be written"),
        (["grade", ".", "--jobs", "0"], "--jobs"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(argv, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=reason):
        main(argv)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def f(:\n", "line 1 of lab1_placements.py is no Python: invalid syntax"),
        ("a = 1\nb = a / 0\n", "line 2 of lab1_placements.py: ZeroDivisionError: division by zero"),
        ("raise SystemExit(0)\n", "line 1 of lab1_placements.py: SystemExit: 0"),
        ("PREDICTIONS = 3\n", "an answer has a wrong form: AttributeError: 'int' object has no"),
        ("", "predictions: the file has no PREDICTIONS; write it, with this name"),
    ],
)
def test_a_fault_of_the_file_is_one_line(text, said, tmp_path):
    assert said in check_lab(FIRST, submission(tmp_path / "a", text)).line


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    for name in ("dtron.testing", "dtron.course.lab4_tensor_parallelism"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(UserError, match="lab 4: its check needs the package hypothesis; pip inst"):
        lab(4)


def test_grades_do_not_depend_on_the_number_of_processes(tmp_path, capsys):
    right = (SOLUTIONS / FIRST.file).read_text()
    texts = [right, right.replace("(84, 384)", "(85, 384)"), "print('a')\nimport os; os._exit(3)"]
    names = [str(submission(tmp_path / f"s{i}", text)) for i, text in enumerate(texts)]
    found = []
    for jobs in ("1", "3"):
        args = ["grade", *names, "--labs", "1", "--jobs", jobs, "--json", str(tmp_path / jobs)]
        assert main(args) == 0
        found.append((tmp_path / jobs).read_text())
    assert found[0] == found[1]
    grades = json.loads(found[0])
    assert [(g["folder"], g["points"], g["of"]) for g in grades] == [
        (names[0], 10, 10),
        (names[1], 8, 10),
        (names[2], 0, 10),
    ]
    assert "before the check (exit code 3)" in grades[2]["labs"][0]["parts"][0]["line"]
    printed = capsys.readouterr().out
    assert f"{names[1]}: lab 1: predictions: w_vocab" in printed and "all points" in printed
    assert f"{names[0]}: " not in printed


def test_the_table_of_all_labs_fits_a_terminal():
    made = [lab(n) for n in LABS]
    results = tuple(check_lab(one, SOLUTIONS / "nowhere") for one in made)
    console = Console(width=80, file=io.StringIO())
    console.print(table([Grade("submissions/somebody", results)]))
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["┃", "submission", *" ".join(f"┃ {n}" for n in (*LABS, "sum")).split(), "┃"] in rows
    shown = "".join(row[1] for row in rows if row[0] == "│")
    assert shown.startswith("submissions/somebody")


def test_an_endless_loop_ends(tmp_path):
    loop = submission(tmp_path / "a", "while True: pass\n")
    assert "more than 1 seconds of CPU; is there an endless loop?" in line(loop)


def test_a_file_that_waits_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("dtron.course.grade.PATIENCE", 0)
    waits = submission(tmp_path / "a", "import time\ntime.sleep(100)\n")
    assert "no result in 0 seconds; does it wait?" in line(waits)


def test_too_much_memory_is_refused(tmp_path):
    hog = submission(tmp_path / "a", "import torch\nx = torch.ones(1 << 33)\n")
    assert "can't allocate memory" in line(hog)
    bytes_ = submission(tmp_path / "b", "x = bytearray(1 << 35)\n")
    assert "MemoryError" in line(bytes_)


def test_processes_of_a_file_end_with_its_check(tmp_path):
    """Forked processes have the connection of the check, and would keep it open. They also have the
    end of a pipe, which is closed when the last of them has ended."""
    os.mkfifo(tmp_path / "pipe")
    text = f"""
import os, time
end = os.open({str(tmp_path / "pipe")!r}, os.O_WRONLY)
for _ in range(3):
    if os.fork() == 0:
        time.sleep(1000)
os._exit(5)
"""
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    said = line(submission(tmp_path / "a", text), Limits(seconds=20))
    assert "the process has ended before the check (exit code 5)" in said
    assert select.select([pipe], [], [], 60)[0] and os.read(pipe, 1) == b""
    os.close(pipe)


def test_a_message_of_megabytes_is_cut_off(tmp_path):
    long = submission(tmp_path / "a", "print('x' * 10**7)\nraise ValueError('y' * 10**7)\n")
    assert len(said := line(long)) < 2 * LONGEST and "line 2 of" in said and said.endswith("y...")


def test_a_file_of_gigabytes_is_refused(tmp_path):
    text = f"with open({str(tmp_path / 'big')!r}, 'wb') as f:\n"
    text += "    f.seek(5 << 30)\n    f.write(b'1')\n"
    assert "File too large" in line(submission(tmp_path / "a", text))


def test_the_rubric_has_every_part(capsys):
    assert main(["rubric", "--labs", "1,5"]) == 0
    printed = capsys.readouterr().out
    for made in (lab(1), lab(5)):
        for part in made.parts:
            cases = "hidden" if part.hidden else "of the page"
            row = rf"│ +{made.number} │ {re.escape(part.name)} +│ +{part.points} │ {cases} +│"
            assert re.search(row, printed), part.name
