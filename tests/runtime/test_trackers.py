"""Trackers get the records of metrics.jsonl: W&B and MLflow without a network, TensorBoard's files
read back. A resumed run goes on as the same tracked run."""

from __future__ import annotations

import contextlib
import io
import json
import threading
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from dtron.errors import UserError
from dtron.runtime.output import CLEAR, Output
from dtron.runtime.summary import Summary
from dtron.runtime.trackers.tracked_run import FILE, TrackedRun
from dtron.runtime.trackers.tracker import TRACKERS, About, check_installed, parse_trackers
from tests.helpers.train_cli import KEYS, SIX, refused, run

pytestmark = pytest.mark.xdist_group("program")

MLFLOW = find_spec("mlflow") is not None  # a large package, which the extra ``test`` lacks
NUMBERS = KEYS - {"mfu"}  # which is unknown on a CPU


def wandb_records(file: Path):
    """Read the log of an offline run: records of LevelDB's format in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, part = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield wandb_internal_pb2.Record.FromString(part)
            part = b""


def read_wandb(run_dir: Path):
    """The starts of an offline run: its id, name, config and steps."""
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        found = list(wandb_records(file))
        (begun,) = (x.run for x in found if x.WhichOneof("record_type") == "run")
        config = {x.key: json.loads(x.value_json) for x in begun.config.update}
        steps = [
            {(x.key or x.nested_key[0]): json.loads(x.value_json) for x in r.history.item}
            for r in found
            if r.WhichOneof("record_type") == "history"
        ]
        yield begun.run_id, begun.project, begun.display_name, config, steps


def of_record(record: dict) -> dict:
    return {name: x for name, x in record.items() if x is not None}


def check_mlflow(run_id: str, want: list[dict], commit: str | None) -> None:
    from mlflow import MlflowClient

    client = MlflowClient()
    (experiment,) = (e for e in client.search_experiments() if e.name == "p")
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.info.run_id == run_id and tracked.info.status == "FINISHED"
    assert tracked.info.run_name == "first" and tracked.data.params["optim.lr"] == "0.005"
    assert tracked.data.tags["optim.lr"] == "0.004"
    assert tracked.data.tags["start.commit"] == str(commit)
    for name in NUMBERS - {"step"}:
        history = client.get_metric_history(run_id, name)
        assert [(m.step, m.value) for m in history] == [(r["step"], r[name]) for r in want]


def test_all_trackers_have_the_records_of_the_file_and_go_on(run_dir, monkeypatch, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{run_dir.with_name('mlflow.db')}")
    names = ",".join(["wandb", "tensorboard"] + ["mlflow"] * MLFLOW)
    argv = [*SIX, f"--track={names}", "--track-name=first", "--track-project=p"]
    run(run_dir, *argv, "--steps=4")
    found = run(run_dir, *argv, "--resume", "--optim.lr=0.004")
    want = [of_record(record) for record in found]
    assert len(want) == 6
    commit = json.loads((run_dir / "starts.jsonl").read_text().splitlines()[0])["commit"]

    (first, second) = read_wandb(run_dir)
    ids = json.loads((run_dir / FILE).read_text())
    assert first[:3] == second[:3] == (ids["wandb"], "p", "first")
    assert first[3]["optim"]["lr"] == 0.005 and second[3]["optim"]["lr"] == 0.004
    assert first[3]["start"]["commit"] == commit
    tracked = [{k: x for k, x in step.items() if k[0] != "_"} for step in first[4] + second[4]]
    assert tracked == want

    if MLFLOW:
        check_mlflow(ids["mlflow"], want, commit)

    board = EventAccumulator(str(run_dir)).Reload()
    pairs = [(r["step"], pytest.approx(r["loss"])) for r in want]
    assert [(e.step, e.value) for e in board.Scalars("loss")] == pairs
    assert NUMBERS - {"step"} <= set(board.Tags()["scalars"])

    out = capsys.readouterr().out
    assert out.count("tracked by wandb: ") == 2 and "summary: 2 steps in " in out


# ---- the flags


def test_names_of_trackers_are_checked():
    assert parse_trackers("none") == () and parse_trackers("wandb, mlflow") == ("wandb", "mlflow")
    for text, said in (("", "''"), ("wand", "wandb, mlflow"), ("wandb,wandb", "twice")):
        with pytest.raises(UserError, match=said):
            parse_trackers(text)


def test_a_missing_package_ends_before_any_rank_starts(run_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(TRACKERS, "wandb", "no_such_package")
    err = refused(capsys, f"--run-dir={run_dir}", "--track=wandb")
    assert "pip install 'dtron[wandb]'" in err and not run_dir.exists()
    check_installed(["tensorboard"])
    (tmp_path / "no_such_package").mkdir()  # a folder of this name is no package
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="not installed"):
        check_installed(["wandb"])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--track=comet"], "'comet'"),
        (["--track-name=a"], "--track-name has no effect"),
        (["--track=tensorboard", "--track-project=a"], "--track-project has no effect"),
        (["--track=wandb", "--track-project="], "--track-project"),
        (["--tensorboard"], "use --track tensorboard"),
    ],
)
def test_flags_that_cannot_be_are_refused(run_dir, capsys, argv, said):
    assert said in refused(capsys, f"--run-dir={run_dir}", *argv)


# ---- a tracker that fails


class Broken:
    known_as, place = None, "nowhere"

    def __init__(self, fails: bool = True) -> None:
        self.fails, self.written, self.ended = fails, [], None

    def write(self, records):
        if self.fails:
            raise ConnectionError("the server\nis gone")
        self.written += records

    def close(self, ending):
        self.ended = ending


def fed(tmp_path: Path, **trackers: Broken) -> TrackedRun:
    about = About("a", "p", tmp_path, {}, {}, 0)
    return TrackedRun(list(trackers), about, lambda name, about: trackers[name])


def test_a_tracker_that_fails_is_reported_once_and_the_others_go_on(tmp_path):
    broken, whole = Broken(), Broken(fails=False)
    tracked = fed(tmp_path, wandb=broken, mlflow=whole)
    for step in range(1, 250):
        tracked.write({"step": step})
    tracked.close("stopped")
    assert [r["step"] for r in whole.written] == list(range(1, 250))
    assert broken.ended == whole.ended == "stopped"
    warning = "warning: wandb: cannot be written (the server is gone); training goes on"
    assert [m for m in tracked.drain_messages() if "warning" in m] == [warning]


def test_a_tracker_that_hangs_does_not_keep_the_run(tmp_path):
    free = threading.Event()

    class Hangs(Broken):
        def write(self, records):
            free.wait(30)

    tracked = fed(tmp_path, wandb=Hangs())
    tracked.write({"step": 1})
    tracked.close("finished", 0.01)
    assert "may not have been sent" in tracked.drain_messages()[-1]
    free.set()


def test_a_tracker_that_cannot_be_opened_is_one_line(tmp_path):
    def fails(name, about):
        raise RuntimeError("no API key\nlog in")

    about = About("a", "p", tmp_path, {}, {}, 0)
    with pytest.raises(UserError, match="--track wandb: cannot be opened .no API key log in.*off"):
        TrackedRun(["wandb"], about, fails)
    (tmp_path / FILE).write_text("{")  # half a file: a new tracked run begins
    with pytest.raises(UserError):
        TrackedRun(["wandb"], replace(about, step=3), fails)


# ---- the terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_live_line_and_a_log_has_none(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "12")
    for stream, want in (
        (Terminal(), f"one\n\rstep 1 of 1{CLEAR}\r{CLEAR}two\n"),
        (io.StringIO(), "one\ntwo\n"),
    ):
        with contextlib.redirect_stdout(stream):
            output = Output()
            output.say("one")
            output.live("step 1 of 10000".__str__)
            output.live("too soon".__str__)
            output.say("two")
            output.end_live()
            Output(main=False).live("of another rank".__str__)
        assert stream.getvalue() == want


def test_the_summary_adds_up():
    summary = Summary()
    assert summary.text() == ""
    record = {"mfu": 0.5, "data_wait_ratio": 0.25, "peak_memory_gib": 2.0, "skipped_steps": 0}
    for step, (seconds, loss) in enumerate([(1.0, 3.0), (3.0, 2.0)], start=1):
        more = {"validation_loss": loss + 1, "checkpoint_stall_seconds": 0.5}
        own = {"step": step, "step_seconds": seconds, "tokens_per_s": 100 / seconds, "loss": loss}
        summary.note(record | own | more)
    assert summary.text() == (
        "summary: 2 steps in 0:04, 50 tokens/s, mfu 50.0%; loss 3.0000 to 2.0000; best validation "
        "loss 3.0000 at step 2; 25.0% of the time waiting for data; 1.0 s for checkpoints; 2.0 GiB "
        "at most"
    )
