"""Checkpoints of a run: a damaged byte is found, old ones are deleted, a full disk stops no run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from dtron import checkpoint
from dtron.checkpoint import files
from dtron.checkpoint.__main__ import main as inspect
from dtron.checkpoint.async_saver import reason
from dtron.checkpoint.meta import FORMAT, Meta, encode_meta
from dtron.mesh import Layout
from dtron.params import init
from dtron.runtime import run_directory
from dtron.runtime.exit import run_cli
from dtron.training.optimizer import init_state
from dtron.training.pipeline import one_stage
from tests.helpers.runs import MODEL
from tests.helpers.train_cli import SIX, TINY, losses, records, run
from tests.helpers.values import ADAMW


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


def an_empty_checkpoint(path, step: int) -> None:
    path.mkdir(parents=True)
    (path / "meta.json").write_bytes(encode_meta(Meta(FORMAT, step, step, step, {}, {}, {})))


@given(
    steps=st.lists(st.integers(1, 40), unique=True, max_size=12),
    keep=st.integers(0, 4),
    every=st.sampled_from([0, 1, 5, 7]),
    data=st.data(),
)
def test_what_need_not_be_kept_is_deleted(tmp_path_factory, steps, keep, every, data):
    run_dir = tmp_path_factory.mktemp("kept")
    for step in steps:
        an_empty_checkpoint(files.target(run_dir, step), step)
    saved = data.draw(st.sampled_from(steps or [0]))
    files.prune(run_dir, saved, keep, every)
    known = sorted(s for s in steps if s <= saved)
    newest = known[-keep:] if keep else known
    want = {s for s in steps if s > saved or s in newest or (every and s % every == 0)}
    assert {one.step for one in files.found(run_dir)} == want


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
    """The program cannot tell this from a full disk. A full disk was tried by hand."""
    run(run_dir, *SIX, "--steps=2")
    good = files.newest(run_dir)
    for step in (4, 6):  # a file in the place of a folder
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
