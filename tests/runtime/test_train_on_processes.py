"""train.py on several processes: the losses of one device, and the error when a rank dies."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dtron.runtime.time_breakdown import breakdown
from dtron.runtime.trace import read
from tests.helpers import dying
from tests.helpers.paths import ROOT
from tests.helpers.ranks import Ranks
from tests.helpers.train_cli import TINY, agree, losses, records, run

# Apart from the group "program", so that two workers share these tests.
pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.usefixtures("run_dir")]


def torchrun(*argv: str, program: str = "train.py", **more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, str(ROOT / program), *TINY, *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1", **more},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_processes_give_the_losses_of_one_device(run_dir, one_device):
    done = torchrun("--mesh=dp=2", "--zero=3", "--profile", f"--run-dir={run_dir}")
    assert done.returncode == 0, done.stderr
    agree(records(run_dir), one_device)
    assert done.stdout.count("step 4: validation loss") == 1
    assert done.stdout.count("communication, exposed") == 1  # rank 0 alone prints the breakdown
    for rank in range(2):
        b = breakdown(read(run_dir / f"trace-rank{rank}.json"))
        assert min(b.matmul, b.attention, b.elementwise, b.communication + b.hidden) > 0


def test_processes_that_are_refused_say_so_once_and_end(run_dir):
    argv = [*TINY, "--mesh=dp=2,tp=2", f"--run-dir={run_dir}"]
    ranks = Ranks(argv, 2, run_dir.with_name("output.txt"))
    assert all(ranks.together())
    said = ranks.output.read_text()
    assert said.count("error: mesh 'dp=2,tp=2' has 4 ranks, but 2 are running") == 1, said
    assert not own_frames(said, ROOT), said
    assert not run_dir.exists()


def own_frames(said: str, root: Path) -> list[str]:
    """The project's own files in the tracebacks of this text.

    torchrun has a traceback too. Its files may be below the checkout, in a .venv, and the checkout
    may have any name."""
    root = root.resolve()
    ours = lambda file: file == root / "train.py" or root / "dtron" in file.parents
    return [name for name in re.findall(r'File "([^"\n]+)"', said) if ours(Path(name).resolve())]


@pytest.mark.parametrize("name", ["main", "dtron", "a dtron"])
def test_frames_of_the_project_are_told_from_others(tmp_path, name):
    root = tmp_path / name
    theirs = [
        ".venv/lib/python3.11/site-packages/torch/distributed/run.py",
        ".venv/dtron/train.py",
        "run.py",
    ]
    ours = ["train.py", "dtron/runtime/exit.py", "dtron/moe/../hf/__main__.py"]
    lines = lambda files: "".join(f'  File "{root / file}", line 1, in main\n' for file in files)
    assert own_frames(lines(theirs), root) == []
    assert own_frames(lines(theirs + ours), root) == [str(root / file) for file in ours]


@pytest.mark.parametrize(
    ("dies", "how", "launcher"),
    [("0", "leaves", True), ("1", "leaves", False), ("1", "hangs", False)],
)
def test_a_rank_that_dies_ends_the_job_and_is_named(run_dir, dies, how, launcher):
    """The neighbouring rank reports the death within the timeout. A job that outlasts the patience
    with its processes would be the hang."""
    timeout = 60 if launcher else 5  # a busy machine takes seconds to start a launcher's processes
    pipe = (
        "--mesh=pp=2",
        "--model.layers=2",
        f"--timeout-seconds={timeout}",
        f"--run-dir={run_dir}",
    )
    if launcher:
        done = torchrun(
            *pipe,
            program="tests/helpers/dying.py",
            DIES=dies,
            HOW=how,
        )
        code, said = done.returncode, done.stderr
        assert not own_frames(said, ROOT), said
    else:
        ranks = Ranks(
            [*TINY, *pipe], 2, run_dir.with_name("output.txt"), dying.main, DIES=dies, HOW=how
        )
        code, said = all(ranks.together()), ranks.output.read_text()
    assert code, said
    other = 1 - int(dies)
    line = f"error: stage {other}: pipeline rank {dies} (stage {dies}) has died or hangs"
    assert line in said and ("--timeout-seconds" in said) == (how == "hangs"), said


def test_pipeline_processes_give_the_losses_of_one_device(run_dir):
    model = ("--model.layers=2", "--model.tied")
    want = losses(run(run_dir.with_name("one"), *model))
    argv = [*TINY, "--mesh=pp=2", "--pipeline.schedule=zb-h1", *model, f"--run-dir={run_dir}"]
    ranks = Ranks(argv, 2, run_dir.with_name("output.txt"))
    assert ranks.together() == [0, 0], ranks.output.read_text()
    agree(records(run_dir), want)
    assert ranks.output.read_text().count("sample: ") == 1
