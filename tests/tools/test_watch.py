"""``dtron watch`` shows what a run has written, and ends with the run."""

from __future__ import annotations

import io
import json
import os
import re
import socket
from pathlib import Path
from unittest import mock

import pytest
from rich.console import Console

from dtron.runtime.exit import run_cli
from dtron.runtime.run_lock import LOCK, RunLock, holder_lives
from dtron.tools import watch
from dtron.tools.watch import TAIL, follow, look, main, show
from tests.tools.test_report import record, write


def append(run: Path, *records: dict) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(x) + "\n" for x in records)


def output(looks, terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(
        file=stream, force_terminal=terminal, markup=False, highlight=False, width=100
    )
    show(looks, "runs/a", console)
    return stream.getvalue()


def trains(run: Path) -> None:
    (run / LOCK).write_text(f"host {socket.gethostname()}, process {os.getpid()}, since today")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_is_followed_to_its_end(tmp_path, terminal):
    run = write(tmp_path / "a", [], steps=3)
    trains(run)
    seen, turns = [], iter([[record(1), record(2)], [], [record(3, validation_loss=1.25)]])
    looks = follow(run, 3, lambda: append(run, *next(turns)))
    text = output((seen.append(x.step) or x for x in looks), terminal)
    assert seen == [0, 2, 2, 3] and next(turns, None) is None
    for part in ("2 of 3", "3 of 3", "2.5000", "1.6667", "1.2500", "36.0 s", "10k"):
        assert part in text, part
    if not terminal:
        first, second = text.splitlines()  # a look without a new step has no line
        assert first.startswith("step 2 of 3  loss 2.5000") and first.endswith("left 36.0 s")
        assert "left" not in second and "\x1b" not in text


def test_a_run_that_died_ends_the_watch(tmp_path, capsys):
    run = write(tmp_path / "a", [record(1)])
    assert run_cli(main, [str(run)]) == 0
    line, end = capsys.readouterr().out.splitlines()
    assert line.startswith("step 1 of 30  loss 5.0000")
    assert end == f"{run} does not train: step 1 of 30"
    append(run, record(30))
    assert run_cli(main, [str(run)]) == 0
    assert capsys.readouterr().out.endswith(f"{run} is finished: step 30 of 30\n")


def test_ctrl_c_ends_the_watch(tmp_path):
    run = write(tmp_path / "a", [record(1)])
    trains(run)
    with mock.patch.object(watch.time, "sleep", side_effect=KeyboardInterrupt):
        assert run_cli(main, [str(run)]) == 0


def test_the_end_of_a_long_file_is_read(tmp_path):
    run = write(tmp_path / "a", [record(i) for i in range(1, 2001)], '{"step": 2001, "lo')
    found = look(run, 3000)
    assert found.step == 2000 and 100 < len(found.recent) < TAIL // 100
    assert found.seconds_left == 1000 * 36 and found.newest("mfu") is None
    (run / "metrics.jsonl").unlink()
    assert look(run, 3000).recent == []


def test_what_cannot_be_watched_is_one_line(tmp_path, capsys):
    run = write(tmp_path / "a", [])
    for argv, part in (
        ([str(tmp_path)], "no run directory"),
        ([str(run), "--every=0"], "--every 0"),
    ):
        assert run_cli(main, argv) == 2
        assert re.fullmatch(r"error: [^\n]+\n", said := capsys.readouterr().err) and part in said
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    assert run_cli(main, [str(run)]) == 2 and "cannot be read" in capsys.readouterr().err


def test_a_holder_lives_until_it_gives_the_lock_back(tmp_path):
    assert not holder_lives(tmp_path)
    lock = RunLock(tmp_path)
    assert holder_lives(tmp_path)
    lock.release()
    assert not holder_lives(tmp_path)
    for text, lives in (
        (f"host {socket.gethostname()}, process {2**22 + 1}, since", False),  # no such process
        (f"host {socket.gethostname()}, process {10**30}, since", False),
        ("host elsewhere, process 1, since", True),
        ("", True),  # its holder is about to write
    ):
        (tmp_path / LOCK).write_text(text)
        assert holder_lives(tmp_path) is lives
