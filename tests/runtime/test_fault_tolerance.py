"""Runs survive signals, which stop them, and SIGKILL at any moment."""

from __future__ import annotations

import random
import signal
import socket
from pathlib import Path

import pytest
import torch

import train
from dtron.checkpoint import files
from dtron.distributed.mesh_shape import MeshShape
from dtron.runtime.signals import StopSignal
from tests.helpers.checkpoints import weights, with_public_tools
from tests.helpers.ranks import Ranks
from tests.helpers.train_cli import SIX, TINY, refused, run

# ---- signals


@pytest.mark.parametrize("number", StopSignal.SIGNALS)
def test_a_signal_finishes_the_step_saves_and_leaves(run_dir, monkeypatch, capsys, number):
    run(run_dir.with_name("whole"), *SIX)
    rate, calls = train.scheduled_rates, []
    if signal.getsignal(number) == signal.SIG_IGN:  # the tests were started by nohup
        signal.signal(number, signal.SIG_DFL)

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(number)
        return rate(*args)

    monkeypatch.setattr(train, "scheduled_rates", interrupted)
    found = run(run_dir, *SIX, "--save-every=0")
    assert [r["step"] for r in found] == [1, 2, 3] and files.newest(run_dir).name == "step-00000003"
    assert f"stopped by {number.name} after step 3; go on with --resume" in capsys.readouterr().out
    assert signal.getsignal(number) not in (None, StopSignal._note)
    run(run_dir, *SIX, "--resume")
    assert weights(run_dir) == weights(run_dir.with_name("whole"))  # to the bit


def stop_on_pool(asked: int) -> tuple[bool, str]:
    """A job for the pool: one rank alone gets a signal."""
    import torch.distributed as dist

    with StopSignal(dist.group.WORLD) as stop:
        before = stop.asked()
        if dist.get_rank() == asked:
            signal.raise_signal(signal.SIGUSR1)
        return before, stop.asked(), stop.name


@pytest.mark.xdist_group("pool")
def test_ranks_agree_to_stop(pool):
    assert pool.run(stop_on_pool, 2) == [(False, True, "SIGUSR1")] * 4


def test_what_torchrun_starts_again_resumes_by_itself(run_dir, monkeypatch, capsys):
    run(run_dir, *SIX, "--steps=2")
    assert "--resume" in refused(capsys, f"--run-dir={run_dir}", *SIX)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert [r["step"] for r in run(run_dir, *SIX)] == [1, 2, 3, 4, 5, 6]
    assert "resumed at step 2" in capsys.readouterr().out


# ---- SIGKILL


EVERY = [
    *TINY,
    "--eval-every=0",
    "--sample-tokens=0",
    "--save-every=1",
    "--keep=2",
    "--log-every=1",
]


def struck(argv: list[str], n: int, run_dir: Path, rng: random.Random) -> None:
    """Start a run and kill it: during the start, in the middle of a step, or of a save.

    Either all ranks die at once, or one of the training ranks. Then the other ranks must end by
    themselves."""
    when = rng.choice(["start", "step", "save"])
    ranks = Ranks(argv, n, run_dir.with_name("output.txt"))
    trains = lambda: "\nstep " in ranks.output.read_text()  # the line of this start's first step
    seen = {
        "start": lambda: True,
        "step": trains,
        "save": lambda: trains() and any(files.folder(run_dir).glob("*.part")),
    }
    while not seen[when]():
        assert not ranks.ended(0.002), ranks.output.read_text()
    later = rng.uniform(0, {"start": 0.8, "step": 0.1, "save": 0.03}[when])
    assert not ranks.ended(later), ranks.output.read_text()
    alone = when != "start" and rng.random() < 0.4
    ranks.kill([rng.randrange(n)] if alone else range(n))
    assert all(ranks.codes()), (
        ranks.output.read_text()
    )  # every rank has ended, and none with success


def survives(run_dir: Path, mesh: str, steps: int, kills: int) -> None:
    """Kill a run several times, then let it end."""
    n, rng = MeshShape.parse(mesh).size, random.Random(kills + len(mesh))
    argv = [*EVERY, f"--mesh={mesh}", f"--steps={steps}", "--zero=3", f"--run-dir={run_dir}"]
    resume = lambda: ["--resume"] if files.newest(run_dir) else []
    for _ in range(kills):
        struck([*argv, *resume()], n, run_dir, rng)
        for path in files.whole(run_dir):
            assert not files.damaged(path, files.read_meta(path))
    ranks = Ranks([*argv, *resume()], n, run_dir.with_name("output.txt"))
    assert ranks.codes() == [0] * n, ranks.output.read_text()


def saved(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and moments of the last step, as full tensors."""
    path = files.newest(run_dir)
    assert files.read_meta(path).step == step
    return with_public_tools(path)


@pytest.mark.parametrize(
    ("mesh", "steps", "kills"),
    [
        ("dp=2", 16, 2),
        *(pytest.param(m, 100, 25, marks=pytest.mark.slow) for m in ("dp=2", "dp=2,tp=2")),
    ],
)
def test_a_run_that_is_killed_goes_on_to_the_same_weights(run_dir, mesh, steps, kills):
    """Equal to the bit on the mesh, and to 1e-5 on one device."""
    survives(run_dir.with_name("whole"), mesh, steps, 0)
    survives(run_dir, mesh, steps, kills)
    got, want = (saved(at, steps) for at in (run_dir, run_dir.with_name("whole")))
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    run(run_dir.with_name("one"), *EVERY[len(TINY) :], f"--steps={steps}")
    one = saved(run_dir.with_name("one"), steps)
    for name in (name for name in one if name.startswith("params.")):
        torch.testing.assert_close(got[name], one[name], rtol=1e-5, atol=1e-5, msg=name)


def test_a_rank_that_is_killed_ends_the_others_at_once(run_dir):
    """The other ranks are in collectives with it, with each other, and in the middle of a save."""
    argv = [*EVERY, "--steps=100000", "--mesh=dp=2,tp=2", "--zero=3", f"--run-dir={run_dir}"]
    ranks = Ranks(argv, 4, run_dir.with_name("output.txt"))
    while not files.newest(run_dir):
        assert not ranks.ended(0.002), ranks.output.read_text()
    ranks.kill([2])
    codes = ranks.codes(patience=120)  # less than --timeout-seconds, which is 600
    said = ranks.output.read_text()
    assert codes[2] == -9 and codes[:2] + codes[3:] == [2, 2, 2], said
    assert "another rank has died or hangs (" in said and "Traceback" not in said
    assert said.count(f"no answer from rank 2 on host {socket.gethostname()}") == 3
