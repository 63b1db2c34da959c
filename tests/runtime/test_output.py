"""Training does not depend on who reads its output, or on files that someone deletes."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import train
from dtron.checkpoint import files
from dtron.runtime.cli import load
from dtron.runtime.exit import run_cli
from dtron.runtime.output import Output, append_line, complain, escape_output, write_line
from dtron.training.lr_schedule import Progress
from tests.helpers.checkpoints import weights
from tests.helpers.paths import ROOT
from tests.helpers.train_cli import SIX, TINY, losses, records, refused, run

PROGRAM = """
import sys
from dtron.runtime.exit import run_cli
from dtron.runtime.output import Output
output = Output()
for line in range(2000):
    output.say(f"line {line} " + "x" * 100)
sys.exit(run_cli(lambda argv: 0, []))
"""


def in_step(step: int, patch: pytest.MonkeyPatch, fault) -> None:
    """Call ``fault`` in this step of the next run."""
    rate = train.scheduled_rates

    def with_fault(optim, at: Progress) -> float:
        if at.done + 1 == step:
            fault()
        return rate(optim, at)

    patch.setattr(train, "scheduled_rates", with_fault)


# ---- the standard output


def full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


BROKEN = [(full, "No space left on device"), (closed_pipe, "Broken pipe")]


@pytest.mark.parametrize(("broken", "reason"), BROKEN)
def test_a_program_ends_well_without_a_reader(broken, reason):
    """Python would end with exit code 120, because it writes the rest when it exits."""
    out = broken()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=out, stderr=subprocess.PIPE, text=True
    )
    os.close(out)
    assert done.returncode == 0
    said = f"warning: standard output cannot be written ({reason}); training goes on\n"
    assert done.stderr == said


def test_a_program_without_any_output_ends_well():
    command = f"exec {sys.executable} -c '{PROGRAM}' >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(("broken", "reason"), BROKEN)
def test_training_goes_on_without_a_reader(run_dir, monkeypatch, capsys, broken, reason):
    want = losses(run(run_dir.with_name("whole"), *SIX, "--profile"))
    with os.fdopen(broken(), "w") as out, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert losses(run(run_dir, *SIX, "--profile")) == want
    assert capsys.readouterr().err.count(f"standard output cannot be written ({reason})") == 1
    assert len(files.whole(run_dir)) == 3


def test_a_text_that_the_terminal_cannot_show_is_escaped(tmp_path, monkeypatch, capsys):
    Output().say("a\x1b[31mb\x07\tc\nd\u2028é")
    complain("a\x1b[31mb")
    said = capsys.readouterr()
    assert said.out == "a[31mb\tc\nd\u2028é\n" and said.err == "a[31mb\n"
    with (tmp_path / "ascii").open("w", encoding="ascii") as out:
        assert write_line(out, "é\ud800") is None
    assert (tmp_path / "ascii").read_text() == "\\xe9\\ud800\n"


@pytest.mark.parametrize("length", [10, 10_000])
def test_a_line_is_one_write(length):
    """The lines of two ranks, which share a terminal, then do not run together."""
    writes = []

    class Raw(io.RawIOBase):
        def writable(self):
            return True

        def write(self, content):
            writes.append(bytes(content))
            return len(content)

    stream = io.TextIOWrapper(io.BufferedWriter(Raw(), 1 << 16), line_buffering=True)
    for letter in "ab":
        assert write_line(stream, letter * length) is None
    assert writes == [letter.encode() * length + b"\n" for letter in "ab"]


def test_a_line_that_does_not_fit_is_not_begun(tmp_path, monkeypatch):
    path = tmp_path / "lines"
    append_line(path, "one")
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, content: write(file, content[:2]))
    with pytest.raises(OSError, match="No space"):
        append_line(path, "two")
    monkeypatch.undo()
    append_line(path, "three")
    assert path.read_text() == "one\nthree\n"


# ---- files of the run


def delete(path: Path) -> None:
    path.unlink()


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("fault", [delete, make_folder])
@pytest.mark.parametrize("name", ["metrics.jsonl", "starts.jsonl", "config.json"])
def test_a_file_that_goes_is_a_warning(run_dir, monkeypatch, capsys, name, fault):
    whole = run(run_dir.with_name("whole"), *SIX)
    in_step(4, monkeypatch, lambda: fault(run_dir / name))
    assert run_cli(train.main, [*TINY, f"--run-dir={run_dir}", *SIX]) == 0
    out, err = capsys.readouterr()
    assert out.count(f"warning: {run_dir / name}: ") == 1 and not err
    assert [path.name for path in files.whole(run_dir)] == [f"step-0000000{n}" for n in (2, 4, 6)]
    same = [weights(folder) for folder in (run_dir, run_dir.with_name("whole"))]
    assert same[0] == same[1]  # to the bit
    if name == "metrics.jsonl" and fault is delete:
        assert losses(records(run_dir)) == losses(whole)[-len(records(run_dir)) :]
    elif fault is delete:
        assert (run_dir / name).stat().st_size > 0
        assert load(run_dir / "config.json").steps == 6


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "starts.jsonl", "config.json", "tokenizer.json", "run.lock"]
)
def test_a_file_that_cannot_be_written_is_refused_at_the_start(run_dir, capsys, name):
    (run_dir / name).mkdir(parents=True)
    capsys.readouterr()
    assert run_cli(train.main, [*TINY, f"--run-dir={run_dir}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    verb, remedy = ("read", "make it") if name == "metrics.jsonl" else ("written", "choose another")
    assert f"cannot be {verb} (Is a directory)" in err and remedy in err


def test_checkpoints_that_cannot_be_listed_are_not_taken_for_none(run_dir, monkeypatch, capsys):
    run(run_dir, *SIX)
    folder, kept = run_dir / "checkpoints", run_dir / "kept"
    folder.rename(kept)
    for make, reason in (
        (lambda: folder.write_text(""), "Not a directory"),
        (lambda: folder.symlink_to("checkpoints"), "Too many levels of symbolic links"),
        (lambda: folder.symlink_to("gone"), "No such file or directory"),
    ):
        make()
        for argv in ([], ["--resume"], ["--resume=auto"]):
            message = refused(capsys, f"--run-dir={run_dir}", *argv)
            assert f"{folder}: cannot be listed ({reason})" in message
        folder.unlink()
    kept.rename(folder)
    listed = os.listdir

    def listdir(path="."):
        if Path(path) == folder:  # permissions would not bind root
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "listdir", listdir)
    assert "Permission denied" in refused(capsys, f"--run-dir={run_dir}", "--steps=2")


@pytest.mark.parametrize("hidden", [".", "checkpoints", "checkpoints/step-00000006"])
def test_checkpoints_in_a_hidden_folder_are_not_taken_for_none(
    run_dir, hidden, monkeypatch, capsys
):
    run(run_dir, *SIX)
    hidden = run_dir / hidden

    def refuse(call):
        def looked(path, *args, **kwargs):
            if isinstance(path, str | Path) and hidden in Path(path).parents:
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *args, **kwargs)

        return looked

    # Permissions would not bind root.
    monkeypatch.setattr(os, "stat", refuse(os.stat))
    monkeypatch.setattr(os, "lstat", refuse(os.lstat))
    for argv in (["--resume"], [], ["--resume=auto"]):
        message = refused(capsys, f"--run-dir={run_dir}", *argv)
        assert f"error: {hidden}/" in message and "Permission denied" in message
        if hidden == run_dir:
            return  # without --resume the lock is refused first


def test_a_new_run_keeps_the_metrics_of_an_earlier_one(run_dir, capsys):
    """A run without checkpoints may be begun again in its directory."""
    first = run(run_dir, "--seed=1")
    second = run(run_dir, "--seed=2")
    third = run(run_dir, "--seed=3")
    assert losses(first) != losses(second)
    kept = [run_dir / f"metrics-{n}.jsonl" for n in (1, 2)]
    for file, want in zip(kept, (first, second), strict=True):
        shutil.copy(file, run_dir / "metrics.jsonl")
        assert records(run_dir) == want
    assert [record["step"] for record in third] == [1, 2, 3, 4]
    assert "metrics.jsonl: the file of an earlier run is now metrics-2.jsonl" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("line", ["5", "null", '{"step": 0}', '{"step": "x", "tokens": 1}', "\xff"])
def test_a_line_that_is_no_record_is_dropped(run_dir, line):
    run(run_dir, *SIX, "--steps=2")
    with (run_dir / "metrics.jsonl").open("a", encoding="latin1") as file:
        file.write(line + "\n")
    assert [record["step"] for record in run(run_dir, "--resume")] == [1, 2, 3, 4]


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_line_is_appended_to_a_regular_file_only(make, tmp_path):
    """A pipe that nobody reads would never open, and a device would never be read to its end."""
    make(tmp_path / "starts.jsonl")
    with pytest.raises(OSError):
        append_line(tmp_path / "starts.jsonl", "{}")


def test_what_a_terminal_cannot_show_is_escaped(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    escape_output()
    Console(highlight=False).print("caf\xe9 \udcff", markup=False)
    sys.stdout.flush()
    assert shown.getvalue() == b"caf\\xe9 \\udcff\n"
