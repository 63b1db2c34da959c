"""What a run outlives: signals, SIGKILL at any moment, steps that are not finite, disks that are
full."""

from __future__ import annotations

import math
import random
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemReader

import train
from dtron import checkpoint
from dtron.checkpoint import files
from dtron.checkpoint.__main__ import main as inspect
from dtron.checkpoint.async_saver import quiet, reason
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import to_local
from dtron.distributed.simulated_ranks import by_rank, simulated
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.params import init
from dtron.rules import rules_for
from dtron.runtime import run_directory
from dtron.runtime.config import RunConfig
from dtron.runtime.exit import run_cli
from dtron.runtime.fault_tolerance import NonFiniteGuard, diagnose
from dtron.runtime.launch import host_group
from dtron.runtime.signals import StopSignal
from dtron.training.optimizer import init_state
from dtron.training.pipeline import one_stage, program
from dtron.training.step import TrainStep
from dtron.tree import flat
from tests.helpers.ranks import Ranks
from tests.helpers.runs import MODEL, on_pool, random_rows
from tests.helpers.texts import corpus
from tests.helpers.values import ADAMW
from tests.runtime.test_train import TINY, enter, losses, records, refused, run
from tests.training.test_steps import TEN

SIX = ["--steps=6", "--eval-every=0", "--sample-tokens=0", "--save-every=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return corpus(tmp_path_factory.mktemp("survive")).parent


@pytest.fixture
def run_dir(folder, tmp_path, monkeypatch) -> Path:
    enter(folder, monkeypatch)
    return tmp_path / "run"


def weights(run_dir: Path) -> dict[str, list[int]]:
    """Sizes and checksums of the tensors in the newest checkpoint, as files."""
    listed = files.read_meta(checkpoint.newest(run_dir))["files"]
    return {
        name: entry for name, entry in listed.items() if name != ".metadata"
    }  # that has the path in it


# ---- checkpoints


@settings(max_examples=8)
@given(data=st.data())
def test_any_flipped_byte_is_found_and_the_checkpoint_before_is_offered(tmp_path_factory, data):
    run_dir = tmp_path_factory.mktemp("flipped")
    pipe = one_stage(MODEL, 1, Layout())
    params = init(pipe.spec, MODEL.dims(), 0, Layout())
    identity = {"text": "x"}
    for step in (2, 4):
        state = checkpoint.TrainState(step, step, params, init_state(ADAMW, pipe.spec, params))
        path = checkpoint.save(run_dir, state, pipe.spec, identity)
    file = data.draw(st.sampled_from(sorted(f for f in path.iterdir() if f.name != "meta.json")))
    place = data.draw(st.integers(0, file.stat().st_size - 1))
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file.name}: is damaged.*resume from step-00000002"):
        checkpoint.load(path, state, pipe.spec, identity)
    assert inspect(["inspect", str(run_dir)]) == 1
    other = checkpoint.load(files.before(path), state, pipe.spec, identity)
    assert other.step == 2


@given(
    steps=st.lists(st.integers(1, 40), unique=True, max_size=12),
    keep=st.integers(0, 4),
    every=st.sampled_from([0, 1, 5, 7]),
)
def test_what_need_not_be_kept_is_deleted(tmp_path_factory, steps, keep, every):
    run_dir = tmp_path_factory.mktemp("kept")
    for step in steps:
        files.target(run_dir, step).mkdir(parents=True)
        (files.target(run_dir, step) / "meta.json").write_text("{}")
    files.prune(run_dir, keep, every)
    newest = sorted(steps)[-keep:] if keep else steps
    want = {s for s in steps if s in newest or (every and s % every == 0)}
    assert {int(p.name.removeprefix("step-")) for p in files.whole(run_dir)} == want


def test_saves_while_training_keep_the_last_and_change_nothing(run_dir, capsys):
    want = losses(run(run_dir.with_name("plain"), *SIX[:3]))
    found = run(run_dir, *SIX, "--keep=1", "--keep-every=4")
    assert losses(found) == want
    assert [p.name for p in files.whole(run_dir)] == ["step-00000004", "step-00000006"]
    assert [r["step"] for r in found if "checkpoint_stall_seconds" in r] == [2, 4, 6]
    assert capsys.readouterr().out.count("saved ") == 3
    assert (
        inspect(["inspect", str(run_dir)]) == 0
        and inspect(["inspect", str(files.newest(run_dir))]) == 0
    )


def test_a_folder_that_cannot_be_written_costs_the_checkpoint_alone(run_dir, monkeypatch, capsys):
    """A full disk is the same to the program; by hand it was tried on one."""
    run(run_dir, *SIX, "--steps=2")
    good = files.newest(run_dir)
    for step in (4, 6):  # a file where a folder must be
        files.target(run_dir, step).with_suffix(".part").write_text("")

    monkeypatch.setattr(run_directory, "clear_parts", lambda run_dir: None)
    assert run_cli(train.main, [*TINY, f"--run-dir={run_dir}", *SIX, "--resume"]) == 2
    out, err = capsys.readouterr()
    assert out.count("warning: ") == 2 and out.count("training goes on") == 2
    assert "step-00000006: cannot write the checkpoint" in err and err.count("\n") == 1
    assert [r["step"] for r in records(run_dir)] == [1, 2, 3, 4, 5, 6]  # training went on
    assert files.newest(run_dir) == good and not files.damaged(good, files.read_meta(good))


def test_a_full_disk_is_called_one(tmp_path, monkeypatch):
    error = RuntimeError("Traceback\n[enforce fail] unexpected pos 704 vs 598")
    assert (
        reason(error, tmp_path)
        == reason(error, tmp_path / "gone")
        == "[enforce fail] unexpected pos 704 vs 598"
    )
    monkeypatch.setattr("shutil.disk_usage", lambda at: SimpleNamespace(free=4096))
    assert reason(error, tmp_path) == "No space left on device"


# ---- signals


@pytest.mark.parametrize("number", StopSignal.SIGNALS)
def test_a_signal_finishes_the_step_saves_and_leaves(run_dir, monkeypatch, capsys, number):
    run(run_dir.with_name("whole"), *SIX)
    rate, calls = train.learning_rate, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(number)
        return rate(*args)

    monkeypatch.setattr(train, "learning_rate", interrupted)
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
    "--log-every=1000",
]


def struck(argv: list[str], n: int, run_dir: Path, rng: random.Random) -> None:
    """Start a run and kill it: while it starts, in the middle of a step, or of a save; all ranks at
    once, or one of those that train, and then the others must end by themselves."""
    when, log = rng.choice(["start", "step", "save"]), run_dir / "metrics.jsonl"
    size = log.stat().st_size if log.exists() else 0
    ranks = Ranks(argv, n, run_dir.with_name("output.txt"))
    trains = lambda: log.exists() and log.stat().st_size > size + 200  # bytes: a line of it or two
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
    )  # each has ended, and none because it was done


def survives(run_dir: Path, mesh: str, steps: int, kills: int) -> None:
    """Kill a run again and again, then let it end."""
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
    """Weights and moments of the last step, whole."""
    path = files.newest(run_dir)
    assert files.read_meta(path)["step"] == step
    listed = FileSystemReader(path).read_metadata().state_dict_metadata
    found = {name: torch.empty(entry.size) for name, entry in listed.items()}
    with quiet():
        dcp.load(found, checkpoint_id=str(path), no_dist=True)
    return found


@pytest.mark.parametrize(
    ("mesh", "steps", "kills"),
    [
        ("dp=2", 16, 2),
        *(pytest.param(m, 100, 25, marks=pytest.mark.slow) for m in ("dp=2", "dp=2,tp=2")),
    ],
)
def test_a_run_that_is_killed_goes_on_to_the_same_weights(run_dir, mesh, steps, kills):
    """To the bit on the mesh; to 1e-5 on one device."""
    survives(run_dir.with_name("whole"), mesh, steps, 0)
    survives(run_dir, mesh, steps, kills)
    got, want = (saved(at, steps) for at in (run_dir, run_dir.with_name("whole")))
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    run(run_dir.with_name("one"), *EVERY[len(TINY) :], f"--steps={steps}")
    one = saved(run_dir.with_name("one"), steps)
    for name in (name for name in one if name.startswith("params.")):
        torch.testing.assert_close(got[name], one[name], rtol=1e-5, atol=1e-5, msg=name)


def test_a_rank_that_is_killed_ends_the_others_at_once(run_dir):
    """They are in collectives with it, with each other, and in the middle of a save."""
    argv = [*EVERY, "--steps=100000", "--mesh=dp=2,tp=2", "--zero=3", f"--run-dir={run_dir}"]
    ranks = Ranks(argv, 4, run_dir.with_name("output.txt"))
    while not files.newest(run_dir):
        assert not ranks.ended(0.002), ranks.output.read_text()
    ranks.kill([2])
    codes = ranks.codes(patience=120)  # and not --timeout-seconds, which is 600
    said = ranks.output.read_text()
    assert codes[2] == -9 and codes[:2] + codes[3:] == [2, 2, 2], said
    assert "another rank has died or hangs (" in said and "Traceback" not in said


# ---- steps that are not finite


def steps_of(optimizer, spoil: int | None) -> list[torch.Tensor]:
    """Weights and optimizer state after three updates; the loss of update ``spoil`` is NaN."""
    layout, found = Layout(), []
    pipe = one_stage(MODEL, 2, layout)
    params = init(pipe.spec, MODEL.dims(), 0, layout)
    opt, functions = init_state(optimizer, pipe.spec, params), program(MODEL, layout)
    spoiled = replace(functions, stage=lambda *a: (functions.stage(*a)[0] * math.nan, None))
    for number in range(3):
        batches = [make_batch(r, layout) for r in random_rows(TEN, number).chunk(2)]
        fn = spoiled if number == spoil else functions
        step = TrainStep(fn, pipe, RunConfig(model=MODEL), optimizer)
        loss, norm, _, params, opt = step(params, opt, batches, 64, 1e-2)
        assert loss.isfinite().item() == (number != spoil)
        found.append([x.clone() for tree in (params, *opt.trees.values()) for x in flat(tree)])
    assert opt.step == 3
    return found


@pytest.mark.parametrize("compile", [False, True])
def test_a_step_that_is_not_finite_moves_nothing(compile):
    first, second, third = steps_of(ADAMW.compiled("aot_eager") if compile else ADAMW, 1)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))
    assert not any(a.equal(b) for a, b in zip(second, third, strict=True))
    assert all(x.isfinite().all() for x in third)


@pytest.mark.parametrize(
    ("where", "mesh"),
    [
        *(("weight", mesh) for mesh in ("dp=1", "tp=2", "dp=2,tp=2")),
        *(("gradient", mesh) for mesh in ("dp=1", "tp=2")),
        pytest.param("gradient", "dp=2,tp=2", marks=pytest.mark.slow),
    ],
)
def test_the_diagnosis_names_weight_rank_and_microbatch(mesh, where):
    shape = MeshShape.parse(mesh)
    with simulated(shape) as device_mesh:
        layout = Layout(device_mesh, rules_for(1))
        pipe = one_stage(MODEL, 2, layout)
        params = init(pipe.spec, MODEL.dims(), 0, layout)
        functions, rank = program(MODEL, layout), shape.size - 1
        batches = [make_batch(r, layout) for r in random_rows(TEN, 0).chunk(2)]
        if where == "weight":
            w = params[0].blocks[1].mlp.w_up
            by_rank(w.to_local() if hasattr(w, "to_local") else w, 0)[rank][0, 0] = math.inf
            want = f"blocks.1.mlp.w_up itself is not finite on rank {rank} (1 in all)"
        else:
            plain = functions.stage
            spoilt = lambda p, x, batch: (
                plain(p, x, batch)[0] * (math.nan if batch is batches[1] else 1.0),
                None,
            )
            functions = replace(functions, stage=spoilt)
            want = "the gradient of w_head is not finite on rank"
        said = diagnose(TrainStep(functions, pipe, TEN, ADAMW), params, batches)
        assert want in said
        assert where == "weight" or "in microbatch 1 " in said
        if where == "gradient":
            clean = diagnose(TrainStep(program(MODEL, layout), pipe, TEN, ADAMW), params, batches)
            assert "are finite" in clean


def diagnose_on_pool(mesh: str, config: RunConfig, spoilt: int) -> list[str]:
    """A job for the pool: what the diagnosis says on this rank, before and after a weight of one
    rank's alone is infinite."""
    import torch.distributed as dist

    said = []

    def diagnosed(step):
        def run(params, opt, batches, *rest):
            group = host_group(20)  # seconds; by now all ranks have started
            said.append(diagnose(step, params, batches, group))
            if dist.get_rank() == spoilt:
                to_local(params[0].blocks[0].mlp.w_up)[0, 0] = math.inf
            said.append(diagnose(step, params, batches, group))
            return step(params, opt, batches, *rest)

        return run

    on_pool(mesh, config, change_step=diagnosed)
    return said


@pytest.mark.xdist_group("pool")
@pytest.mark.parametrize(("mesh", "zero", "block"), [("pp=4", 1, 2), ("dp=4", 3, 0)])
def test_a_weight_of_one_rank_is_named_by_all(pool, mesh, zero, block):
    """None begins a backward, in which it would wait for the one that knows better."""
    config = replace(TEN, model=replace(TEN.model, layers=4), steps=1, zero=zero)
    for clean, found in pool.run(diagnose_on_pool, mesh, config, 2):
        assert "are finite" in clean
        assert f"blocks.{block}.mlp.w_up itself is not finite on rank 2 (1 in all)" in found


def test_a_run_that_comes_to_nothing_stops_and_says_why(run_dir, capsys):
    argv = [
        *TINY,
        f"--run-dir={run_dir}",
        "--optim.lr=1e30",
        "--steps=30",
        "--max-nonfinite-steps=3",
    ]
    assert run_cli(train.main, argv) == 2
    out, err = capsys.readouterr()
    assert "3 steps in a row were skipped; " in err and "--optim.lr" in err and err.count("\n") == 1
    assert "not finite; skipped, 1 in a row" in out
    assert records(run_dir)[-1]["skipped_steps"] >= 2 and records(run_dir)[-1]["grad_norm"] is None


@given(st.lists(st.floats(1.0, 1.2), min_size=25, max_size=60), st.floats(3.0, 9.0))
def test_a_spike_is_noticed_and_noise_is_not(usual, high):
    watch = NonFiniteGuard(3)
    assert not any(watch.note(i, x, 1.0) for i, x in enumerate([1.0, 1.1, 1.2] * 10))
    assert "jumped to" in watch.note(99, high, 1.0)
    assert watch.note(100, math.nan, 1.0) and watch.note(101, 1.0, math.inf)
    assert watch.skipped_steps == watch.in_a_row == 2 and not watch.over
    assert watch.note(102, 1.1, 1.0) is None and watch.in_a_row == 0
