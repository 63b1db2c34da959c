"""train.py refuses what cannot run, in one line with the remedy."""

import errno
import os
import subprocess
import sys

import pytest
import torch

from dtron.errors import UserError
from dtron.runtime import check_memory, exit
from dtron.runtime.cli import parse
from dtron.runtime.exit import OF_THE_DISK, run_cli
from dtron.runtime.launch import plan_run
from dtron.runtime.roll_call import Address
from tests.helpers.paths import ROOT
from tests.helpers.texts import words
from tests.helpers.train_cli import refused, run

EMPTY = "import sys; from dtron.runtime.exit import run_cli; sys.exit(run_cli(lambda _: 0, []))"
pytestmark = [pytest.mark.xdist_group("program"), pytest.mark.usefixtures("run_dir")]


def test_an_error_of_one_rank_alone_is_said(monkeypatch, capsys):
    """Two processes on a machine with one GPU: only the second process has no GPU."""

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(exit, "OTHERS_WAIT", 0.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(check_memory, "_gpu_memory", lambda device: 1 << 40)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        try:
            run_cli(lambda argv: plan_run(parse(argv)) and 0, ["--device=cuda"])
        except SystemExit as stop:
            assert stop.code == 2
    assert "this machine has 1 GPUs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ("--mesh dp=2", ["mesh 'dp=2' has 2 ranks", "1 is running", "--simulate"]),
        ("--mesh xp=2", ["'xp'", "dp_replicate"]),
        ("--simulate --mesh tp=2,tp=2", ["'tp'", "twice"]),
        ("--simulate --mesh dp=0", ["'0'", "positive"]),
        ("--simulate --mesh dp=-2", ["'-2'", "positive"]),
        ("--simulate --mesh dp=two", ["'two'", "positive"]),
        ("--simulate --mesh dp", ["dp has size ''", "dp=2"]),
        (
            "--simulate --mesh cp=2 --data.seq-len 14",
            ["data.seq_len=", "over cp=2", "multiple of 4"],
        ),
        ("--simulate --mesh pp=2", ["2 pipeline stages for model.layers=1", "--model.layers 2"]),
        (
            "--simulate --mesh pp=2 --model.layers 4 --pipeline.layers 3,2",
            ["3,2", "sum to model.layers=4"],
        ),
        (
            "--simulate --mesh pp=2 --model.layers 4 --pipeline.layers 4",
            ["must be 2 positive numbers"],
        ),
        ("--simulate --mesh pp=2 --model.layers 4 --pipeline.layers a,b", ["'a,b'", "7,9"]),
        (
            "--simulate --mesh pp=2 --model.layers 4 --pipeline.schedule zbv",
            ["--pipeline.schedule", "'zbv'", "'zb-v'"],
        ),
        (
            "--simulate --mesh pp=4 --model.layers 8 --pipeline.schedule dualpipe-v",
            ["at least 8 microbatches, has 4"],
        ),
        ("--simulate --mesh tp=4", ["model.heads=2", "tp=2", "--model.heads 4"]),
        ("--simulate --mesh tp=2 --model.kv-heads 1", ["model.kv_heads=1", "--model.kv-heads 2"]),
        ("--simulate --mesh tp=2 --model.mlp 63", ["model.mlp=63", "--model.mlp 64"]),
        ("--simulate --mesh tp=2 --data.seq-len 15", ["data.seq_len=15", "--data.seq-len 16"]),
        ("--simulate --mesh dp=3", ["batch=4", "3 data ranks", "--batch 3"]),
        ("--micro-batch 3", ["batch=4", "micro_batch=3", "--batch 3"]),
        ("--micro-batch 0", ["micro_batch=0", "at least 1"]),
        ("--simulate --device cuda", ["--simulate --device cuda", "drop one"]),
        ("--cuda-graph on", ["--cuda-graph on", "a GPU and compiled stages", "--cuda-graph auto"]),
        ("--data.seq-len 4096", ["data.seq_len=4096", "--model.context 4096"]),
        ("--data.validation-ratio 1e-4", ["validation text", "raise --data.validation-ratio,"]),
        ("--data.path /no/such.txt", ["--data.path '/no/such.txt'", "does not exist"]),
        ("--data.tokenizer /no/such.json", ["--data.tokenizer '/no/such.json'", "does not exist"]),
        ("--data.column body", ["'body'", "--data.column", "'text'"]),
        ("--model.vocab 100", ["--model.vocab 100", "--model.vocab 257"]),
        ("--stpes 3", ["--stpes: unknown flag", "--steps"]),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(run_dir, capsys, argv, parts):
    message = refused(capsys, f"--run-dir={run_dir}", *argv.split())
    for part in parts:
        assert part in message


def test_files_that_cannot_be_read_are_refused(run_dir, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    five = words({word: i for i, word in enumerate("?abcd")}, tmp_path / "five.json")
    at = f"--run-dir={run_dir}"
    assert "no text at all" in refused(capsys, at, f"--data.path={tmp_path / 'empty.txt'}")
    assert "not a readable Parquet" in refused(
        capsys, at, f"--data.path={tmp_path / 'bad.parquet'}"
    )
    message = refused(capsys, at, f"--data.tokenizer={five}", "--model.vocab=4")
    assert "5 tokens and the model only 4" in message and "--model.vocab 5" in message


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_the_folder_of_a_model_is_no_run_dir(run_dir, name, capsys):
    """A run would write its own files over those of the model."""
    run_dir.mkdir()
    (run_dir / name).write_text('{"architectures": ["LlamaForCausalLM"]}')
    for argv in ([], ["--resume=auto"]):
        message = refused(capsys, f"--run-dir={run_dir}", *argv)
        assert f"holds a {name} that no run wrote" in message and "choose another" in message
    assert "architectures" in (run_dir / name).read_text()


def test_homes_that_are_not_are_refused(capsys):
    for flag in ("--run-dir", "--data.path", "--data.tokenizer"):
        assert "~nobody-of-this-name/a" in refused(capsys, f"{flag}=~nobody-of-this-name/a")
    assert "$HOME" in refused(capsys, "--run-dir=~/a")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file names")
def test_a_run_dir_and_a_cache_need_not_be_unicode(run_dir, monkeypatch):
    odd = os.fsdecode(b"\xff")
    monkeypatch.setenv("DTRON_CACHE", str(run_dir.with_name(odd)))
    run(run_dir.with_name(f"run-{odd}"), "--steps=1", "--eval-every=0", "--sample-tokens=0")


def test_a_run_dir_that_cannot_be_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "run"  # permissions of a folder would not bind root
    assert f"--run-dir {below}: cannot be written" in refused(capsys, f"--run-dir={below}")
    assert "has no checkpoint" in refused(capsys, f"--run-dir={tmp_path}", "--resume")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]
    long = tmp_path / ("x" * 300)
    for argv in ([], ["--resume"], ["--resume=auto"]):
        assert "a name in it has 300 bytes" in refused(capsys, f"--run-dir={long}", *argv)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "x"),
        ("WORLD_SIZE", "two"),
        ("LOCAL_RANK", "-1"),
        ("MASTER_PORT", "²"),
        ("TORCHELASTIC_RESTART_COUNT", ""),
    ],
)
def test_a_variable_of_torchrun_that_is_no_number_is_refused(run_dir, name, value):
    variables = {"WORLD_SIZE": "1", "RANK": "0"} | {name: value}
    done = subprocess.run(
        [sys.executable, "-c", EMPTY],
        env=os.environ | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith(f"error: {name}={value!r}: must be")
    assert done.stderr.count("\n") == 1


def test_a_missing_variable_of_torchrun_is_named(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR: is not set.*torchrun"):
        Address.of_this_process()


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENAMETOOLONG, errno.ENOSPC, errno.EIO])
def test_a_file_that_cannot_be_used_is_one_line(code, capsys):
    """Wherever it happens: a folder that is not readable fails at any question about its files."""

    def main(argv: list[str]) -> int:
        raise OSError(code, os.strerror(code), "some/file")

    assert run_cli(main, []) == 2
    line = f"error: some/file: {os.strerror(code)}; {OF_THE_DISK[code]}\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    "error", [OSError(errno.EACCES, "no file"), FileNotFoundError(2, "a", "b")]
)
def test_a_fault_of_the_program_keeps_its_traceback(error):
    def main(argv: list[str]) -> int:
        raise error

    with pytest.raises(OSError):
        run_cli(main, [])
