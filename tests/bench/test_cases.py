"""Cases of a batch compile together and are timed alone. A case that fails spoils no other case."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dtron.runtime.exit import run_cli
from tests.helpers.paths import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import cases  # noqa: E402  (the benchmarks are no part of the package)

# Stands in for bench/train.py: it takes turns in the same way, and logs what it does.
TRAIN = """
import json, sys
sys.path.insert(0, {bench!r})
from turns import await_turn

def note(what):
    with open({log!r}, "a") as f:
        f.write(f"{{name}} {{what}}\\n")

*flags, turn = sys.argv[1:]
name = flags[0]
if "--broken" in flags:
    raise MemoryError("too large")
note("compiled")
{wait}
note("begins")
print("where the time went")
print(json.dumps({{"name": name}}))
note("ends")
"""
WAIT = "await_turn(turn.removeprefix('--turn='))"


def run(tmp_path: Path, monkeypatch, text: str, wait: str, *flags: str) -> tuple[int, list[str]]:
    """Run ``cases``; return its result and the log of the stand-in."""
    train, log, file = (tmp_path / name for name in ("train.py", "log", "cases.txt"))
    train.write_text(TRAIN.format(bench=str(ROOT / "bench"), log=str(log), wait=wait))
    file.write_text(text)
    log.touch()
    monkeypatch.setattr(cases, "TRAIN", train)
    code = run_cli(cases.main, [str(file), *flags])
    return code, log.read_text().splitlines()


def one_by_one(log: list[str], names: list[str]) -> bool:
    """Every case compiles before the first is timed. Then each is timed alone."""
    n, in_turn = len(names), [f"{name} {what}" for name in names for what in ("begins", "ends")]
    return sorted(log[:n]) == sorted(f"{name} compiled" for name in names) and log[n:] == in_turn


def test_a_batch_compiles_together_and_is_timed_one_by_one(tmp_path, monkeypatch, capsys):
    code, log = run(
        tmp_path, monkeypatch, "--a  # a remark\n--broken\n# another\n--b\n\n\n--c\n", WAIT
    )
    out, err = capsys.readouterr()
    assert [json.loads(x)["name"] for x in out.splitlines()] == ["--a", "--b", "--c"]
    assert one_by_one(log[:6], ["--a", "--b"]) and one_by_one(log[6:], ["--c"])
    assert (
        code == 1
        and "--broken\nMemoryError: too large\n" in err
        and err.count("where the time went") == 3
    )


def test_cases_are_chosen_by_name(tmp_path, monkeypatch, capsys):
    code, log = run(tmp_path, monkeypatch, "a: --a\n--b\nc: --c\n", WAIT, "--only", "c")
    assert code == 0 and one_by_one(log, ["--c"])
    capsys.readouterr()
    assert run(tmp_path, monkeypatch, "a: --a\n--b\n", WAIT, "--only", "d")[0] == 2
    assert "has no such case; its names are a" in capsys.readouterr().err


def test_of_many_ranks_the_first_reason_is_given(tmp_path, monkeypatch, capsys):
    """The reason is not torchrun's last line."""
    code, log = run(tmp_path, monkeypatch, "--mesh=dp=2 --broken\n--a\n", WAIT, "--gpus=2")
    out, err = capsys.readouterr()
    assert code == 1 and one_by_one(log, ["--a"]) and json.loads(out) == {"name": "--a"}
    assert "MemoryError: too large" in err and "ChildFailedError" not in err


def test_a_case_that_does_not_wait_is_noticed(tmp_path, monkeypatch):
    log = run(tmp_path, monkeypatch, "--a\n--b\n", "")[1]
    assert len(log) == 6 and not one_by_one(log, ["--a", "--b"])


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (
            "--a\n--mesh dp=2,tp=2\n",
            "cases.txt:2: '--mesh dp=2,tp=2' takes 4 GPUs of 1; give more with --gpus",
        ),
        ("\n--mesh dp=x\n", "cases.txt:2: "),
        ("--mesh\n--model 'a b\n", "cases.txt:2: No closing quotation"),
        ("--model \udcff\n", "cases.txt: cannot be read (not UTF-8); give a file of cases"),
        (None, "nothing.txt: cannot be read (No such file or directory); give a file of cases"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(tmp_path, capsys, text, part):
    file = tmp_path / ("nothing.txt" if text is None else "cases.txt")
    if text is not None:
        file.write_text(text, errors="surrogateescape")
    assert run_cli(cases.main, [str(file)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and part in err


def test_the_cases_of_the_page_can_be_read(tmp_path):
    assert sum(map(len, cases.read(ROOT / "bench" / "results" / "cases.txt", tmp_path, 2))) > 20
