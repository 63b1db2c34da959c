"""The benchmarks import few packages."""

from __future__ import annotations

import subprocess
import sys

from tests.helpers.paths import ROOT


def test_the_benchmarks_need_torch_and_numpy_alone():
    """dtron's other dependencies are out of reach. One process tests both programs, because
    importing torch takes most of the time."""
    code = """
import runpy, sys
sys.modules.update(dict.fromkeys(["rich", "tyro", "tokenizers", "datasets"]))
for program in sys.argv[1:]:
    sys.argv = [program, "--help"]
    sys.path.insert(0, program.rpartition("/")[0])  # as python does for a program
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code
"""
    command = [
        sys.executable,
        "-c",
        code,
        *(str(ROOT / "bench" / f"{n}.py") for n in ("train", "pipeline")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    helps = done.stdout.split("usage: ")[1:]
    assert [text.split()[0] for text in helps] == ["train.py", "pipeline.py"]
    assert all("--microbatches" in text for text in helps)
