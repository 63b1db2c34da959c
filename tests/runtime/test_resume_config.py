"""--resume takes the config of the run, flags override it, and --resume auto does what is due."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import train
from dtron.checkpoint import files
from dtron.errors import UserError
from dtron.runtime.cli import load, parse, text
from dtron.runtime.config import DataConfig, RunConfig
from dtron.runtime.exit import run_cli
from dtron.runtime.resume import changes, with_value
from dtron.training.lr_schedule import learning_rate
from tests.helpers.checkpoints import weights
from tests.helpers.train_cli import SIX, TINY, losses, records, refused, run

pytestmark = [pytest.mark.xdist_group("program"), pytest.mark.usefixtures("run_dir")]


def resumed(run_dir: Path, *argv: str, value: str = "--resume") -> list[dict]:
    """Resume with no other flags than these."""
    assert run_cli(train.main, [value, f"--run-dir={run_dir}", *argv]) == 0
    return records(run_dir)


def killed(run_dir: Path, *argv: str) -> None:
    """A run of six steps whose process has died after step 2. A copy has all its steps."""
    run(run_dir, *SIX, *argv)
    shutil.copytree(run_dir, run_dir.with_name("whole"))
    for step in (4, 6):
        shutil.rmtree(files.target(run_dir, step))


def test_resume_alone_goes_on_as_the_run_began(run_dir, capsys):
    killed(run_dir, "--optim.weight-decay=0.3", "--micro-batch=2")
    capsys.readouterr()
    assert losses(resumed(run_dir)) == losses(records(run_dir.with_name("whole")))
    assert weights(run_dir) == weights(run_dir.with_name("whole"))
    assert " -> " not in capsys.readouterr().out
    same = replace(load(run_dir / "config.json"), resume="off")
    assert same == load(run_dir.with_name("whole") / "config.json")


def test_flags_override_the_config_and_are_printed(run_dir, capsys):
    killed(run_dir)
    capsys.readouterr()
    mesh = ["--mesh=dp=2", "--simulate", "--zero=3", "--micro-batch=1"]
    found = resumed(run_dir, "--optim.lr", "0.001", "--steps=8", *mesh)
    assert len(found) == 8
    before, now = load(run_dir.with_name("whole") / "config.json"), load(run_dir / "config.json")
    old, new = (learning_rate(c.optim, c.progress(2, 8)) for c in (before, now))
    assert (found[1]["lr"], found[2]["lr"]) == (
        learning_rate(before.optim, before.progress(1, 4)),
        new,
    )
    out = capsys.readouterr().out.splitlines()
    assert sorted(line for line in out if " -> " in line) == [
        "--mesh: '' -> dp=2",
        "--micro-batch: None -> 1",
        "--optim.lr: 0.005 -> 0.001",
        "--simulate: False -> True",
        "--steps: 6 -> 8",
        "--zero: 1 -> 3",
    ]
    assert (
        out.count(
            f"the learning-rate schedule has changed: step 3 has the rate {new:.3e}, before the "
            f"change {old:.3e}"
        )
        == 1
    )
    capsys.readouterr()
    resumed(run_dir, "--steps=9")  # the overridden values are the config of the run now
    assert "--steps: 8 -> 9" in capsys.readouterr().out
    assert load(run_dir / "config.json").optim.lr == 0.001


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", False),
        ("--steps 200", True),
        ("--optim.lr 1", True),
        ("--optim.warmup 3", True),
        ("--optim.schedule wsd", True),
        ("--optim.min-lr-ratio 0", True),
        ("--optim.wsd-decay-ratio 0.5", True),
        ("--optim.schedule constant", True),
        ("--optim.weight-decay 0", False),
        ("--batch 4", False),
    ],
)
def test_a_change_of_the_schedule_is_said(flags, said):
    lines = changes(RunConfig(), parse(flags.split()), 50, 800)
    assert len(lines) == len(flags.split()) // 2 + said
    assert ("the learning-rate schedule has changed" in " ".join(lines)) == said


def test_more_steps_of_a_constant_rate_change_no_rate():
    constant = parse(["--optim.schedule", "constant"])
    assert changes(constant, replace(constant, steps=200), 50, 800) == ["--steps: 100 -> 200"]


def test_what_defines_the_run_may_not_change(run_dir, capsys):
    killed(run_dir)
    at = [f"--run-dir={run_dir}", "--resume"]
    for flag, remedy in (
        ("--model.mlp=96", "--model.mlp 64"),
        ("--model.mup-base-width=16", "--model.mup-base-width 0"),
        ("--seed=1", "--seed 0"),
    ):
        assert run_cli(train.main, [*at, flag]) == 2
        err = capsys.readouterr().err
        assert remedy in err and err.count("\n") == 1
    assert run_cli(train.main, [*at, "--steps=2"]) == 2
    assert "use more steps" in capsys.readouterr().err


def test_auto_begins_goes_on_and_has_nothing_to_do(run_dir, capsys):
    """The command of a requeued job is always the same."""
    argv = [*SIX[:3], "--resume", "auto"]
    found = run(run_dir, *argv)
    assert len(found) == 6  # it saves the last step without --save-every
    assert [path.name for path in files.whole(run_dir)] == ["step-00000006"]
    before = {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert run_cli(train.main, [*TINY, f"--run-dir={run_dir}", *argv]) == 0
    line = f"{run_dir}/checkpoints/step-00000006: the run is finished; nothing to do\n"
    assert capsys.readouterr() == (line, "")
    assert {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()} == before
    assert refused(capsys, f"--run-dir={run_dir}", *SIX, "--resume").endswith("use more steps\n")
    assert len(run(run_dir, *argv, "--steps=8")) == 8

    shutil.rmtree(run_dir)
    killed(run_dir, "--resume=auto")
    assert losses(resumed(run_dir, value="--resume=auto")) == losses(
        records(run_dir.with_name("whole"))
    )
    assert weights(run_dir) == weights(run_dir.with_name("whole"))


def test_auto_begins_from_its_flags_if_nothing_was_saved(run_dir):
    run(run_dir, "--seed=3")  # it was killed before its first checkpoint
    assert len(run(run_dir, "--seed=4", "--resume=auto")) == 4
    assert load(run_dir / "config.json").seed == 4


# ---- the files of the run


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "5", '{"steps": "x"}', '{"steps": true}', '{"steps": 0}', '{"optim": 3}']
    + ['{"model": {"activation": "bogus"}}', '{"nothing": 1}', "[" * 10000, '{"dtype": null}'],
)
def test_a_config_that_cannot_be_read_is_refused(run_dir, capsys, content):
    saved = files.target(run_dir, 2)
    saved.mkdir(parents=True)
    (saved / "meta.json").write_text("{}")
    (run_dir / "config.json").write_text(content)
    message = refused(capsys, f"--run-dir={run_dir}", "--resume")
    assert f"{run_dir / 'config.json'}: --resume cannot read the config of the run" in message


def test_a_run_without_its_config_goes_on_with_the_flags(run_dir):
    killed(run_dir)
    (run_dir / "config.json").unlink()
    assert losses(run(run_dir, *SIX, "--resume")) == losses(records(run_dir.with_name("whole")))
    assert load(run_dir / "config.json").steps == 6


def test_the_folder_of_the_first_weights_is_not_needed(run_dir, monkeypatch):
    """The weights come from the checkpoint. Another folder would do nothing, so it is refused."""
    began = RunConfig(init_from="models/a", run_dir="elsewhere")
    saved = files.target(run_dir, 2)
    saved.mkdir(parents=True)
    (saved / "meta.json").write_text("{}")
    (run_dir / "config.json").write_text(text(began))
    at = [f"--run-dir={run_dir}", "--resume"]
    want = replace(began, run_dir=str(run_dir), resume="on")
    assert parse(at) == parse([*at, "--init-from", "models/a"]) == want
    assert parse([*at, "--init_from=./models/a"]) == replace(want, init_from="./models/a")
    with pytest.raises(UserError, match="--init-from b: this run began from models/a.*drop"):
        parse([*at, "--init-from", "b"])
    (run_dir / "config.json").write_text(text(RunConfig()))
    with pytest.raises(UserError, match="began from random weights"):
        parse([*at, "--init-from", "b"])


def test_the_tokenizer_of_a_folder_that_is_gone_is_the_copy_of_the_run(run_dir):
    saved, copy = files.target(run_dir, 2), run_dir / "hf" / "tokenizer.json"
    began = RunConfig(init_from="gone", data=DataConfig(tokenizer="gone/tokenizer.json"))
    for file, content in ((saved / "meta.json", "{}"), (run_dir / "config.json", text(began))):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    at = [f"--run-dir={run_dir}", "--resume"]
    assert parse(at).data.tokenizer == "gone/tokenizer.json"  # it is refused later, by its name
    copy.parent.mkdir()
    copy.write_text("{}")
    assert parse(at).data.tokenizer == str(copy)
    assert parse([*at, "--data.tokenizer=mine.json"]).data.tokenizer == "mine.json"


def test_resume_may_have_no_value():
    for argv in ("", "--resume", "--resume --steps 3", "--resume=auto -h", "--steps 3"):
        want = argv.replace("--resume -", "--resume on -").removesuffix("--resume")
        want += "--resume on" if argv.endswith("--resume") else ""
        assert with_value(argv.split()) == want.split()
    assert with_value(["--resume", "auto"]) == ["--resume", "auto"]


def test_a_config_is_read_as_json_writes_it(tmp_path):
    """Whole numbers may stand for fractions."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"optim": {"lr": 1}, "micro_batch": None}))
    assert load(file).optim.lr == 1
