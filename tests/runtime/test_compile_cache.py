"""The folder of compiled code: where it is, and what a killed process has left in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from dtron.errors import UserError
from dtron.runtime.compile_cache import (
    FOLDER,
    describe_first_step,
    is_whole,
    open_compile_cache,
    remove_half_written,
)
from tests.helpers.paths import ROOT


@pytest.fixture
def library(tmp_path) -> Path:
    """A whole library, as a linker writes it."""
    import torch._C as extension

    path = tmp_path / "ab" / "cabcd.main.so"
    path.parent.mkdir()
    shutil.copy(extension.__file__, path)
    return path


def test_a_library_of_any_length_is_whole_or_removed(library):
    whole = library.read_bytes()
    assert is_whole(library)
    for size in (0, 3, 63, 64, len(whole) // 2):
        library.write_bytes(whole[:size])
        assert not is_whole(library)
        remove_half_written(library.parents[1])
        assert not library.exists()
    library.write_bytes(bytes(len(whole)))  # the linker has not written the head yet
    assert not is_whole(library)
    library.write_bytes(whole)
    remove_half_written(library.parents[1])
    assert library.exists()


def test_a_library_that_another_process_writes_is_left_alone(library):
    library.write_bytes(library.read_bytes()[:99])
    folder = library.parents[1]
    (folder / "locks").mkdir()
    with FileLock(folder / "locks" / "cabcd.lock"):
        remove_half_written(folder)
        assert library.exists()
    remove_half_written(folder)
    assert not library.exists()


def test_the_folder_is_the_flag_the_variable_or_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DTRON_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    open_compile_cache(None)
    assert os.environ[FOLDER] == str(tmp_path / "cache" / "compile")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "cache" / "compile" / "triton")
    monkeypatch.setenv(FOLDER, str(tmp_path / "mine"))
    open_compile_cache(None)
    assert os.environ[FOLDER] == str(tmp_path / "mine")
    open_compile_cache(str(tmp_path / "named"))
    assert os.environ[FOLDER] == str(tmp_path / "named") and (tmp_path / "named").is_dir()


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.delenv(FOLDER, raising=False)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=f"--compile-cache {file}: .*name a folder"):
        open_compile_cache(str(file))
    monkeypatch.setenv("DTRON_CACHE", str(file))
    open_compile_cache(None)  # nobody has asked for this folder
    assert FOLDER not in os.environ


def test_the_first_step_says_what_it_did(monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setitem(counters, "inductor", {"fxgraph_cache_hit": 3, "fxgraph_cache_miss": 0})
    assert describe_first_step(2.04).startswith("loaded compiled code in 2.0 s, from ")
    monkeypatch.setitem(counters, "inductor", {"fxgraph_cache_hit": 3, "fxgraph_cache_miss": 1})
    assert describe_first_step(14).startswith("compiled in 14.0 s; ")


@pytest.mark.slow
def test_a_run_after_a_kill_in_the_linker(tmp_path):
    """Every library is cut, as by a kill. The next run compiles again."""
    small = [
        "--model.layers",
        "1",
        "--model.embed",
        "32",
        "--model.heads",
        "2",
        "--model.kv-heads",
        "2",
    ]
    common = [
        "--steps",
        "2",
        "--batch",
        "2",
        "--compile",
        "on",
        "--sample-tokens",
        "0",
        "--data.seq-len",
        "16",
    ]

    def run(name: str) -> str:
        folders = ["--compile-cache", str(tmp_path / "code"), "--run-dir", str(tmp_path / name)]
        command = [sys.executable, str(ROOT / "train.py"), *small, *common, *folders]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "compiled in" in run("first")
    assert "loaded compiled code" in run("second")
    for library in (tmp_path / "code").rglob("*.so"):
        library.write_bytes(library.read_bytes()[:3000])
    run("third")
