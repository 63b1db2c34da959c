"""--config FILE: a file of flags is read as the flags, and every mistake in it is one line."""

from __future__ import annotations

import json
import re
import typing
from dataclasses import asdict, replace
from pathlib import Path
from types import UnionType
from unittest import mock

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from dtron.errors import UserError
from dtron.model.presets import PRESETS, preset
from dtron.renamed import dotted, nested
from dtron.runtime import config_file
from dtron.runtime.check_values import check_values
from dtron.runtime.cli import _build, parse, text
from dtron.runtime.config import RunConfig
from dtron.runtime.config_file import toml_text
from dtron.runtime.flags import fields_of, flags_of
from dtron.testing import assert_caught
from dtron.tools.plan import PlanConfig
from dtron.tools.show import ShowConfig
from dtron.tools.verify import VerifyConfig
from tests.helpers.examples import examples

SAME = """
steps = 7
micro-batch = 2
simulate = true
[model]
preset = "gpt2-124m"
layers = 4
[optim]
lr = 3e-4
[data]
path = "a b.txt"
"""
AS_YAML = """
steps: 7
micro_batch: 2
simulate: true
compile: off  # text, and no boolean
model: {preset: gpt2-124m, layers: 4}
optim:
  lr: 3e-4
data: {path: a b.txt}
"""
FLAGS = ["--steps=7", "--micro-batch=2", "--simulate", "--model=gpt2-124m", "--model.layers=4"]
FLAGS += ["--optim.lr=3e-4", "--data.path=a b.txt"]
DEEP = "[" * 2000


def test_the_keys_are_the_flags():
    """The hints of a class have more than its fields, such as the mixers of a model."""
    keys = {"--" + key.replace("_", "-") for key in fields_of(RunConfig)}
    beside = {*flags_of(RunConfig)} - keys  # the opposites of switches
    assert keys <= {*flags_of(RunConfig)} and all(re.search(r"[-.]no-", flag) for flag in beside)


@pytest.fixture
def written(tmp_path):
    def write(content: str | bytes, name: str = "run.toml") -> str:
        data = content.encode() if isinstance(content, str) else content
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    return write


def refused(*argv: str, default=None) -> str:
    with pytest.raises(UserError) as caught:
        parse(argv, default)
    message = str(caught.value)
    assert message == " ".join(message.split())
    return message


def test_a_file_is_read_as_its_flags(written):
    want = parse(FLAGS)
    assert parse(["--config", written(SAME)]) == want
    for name in ("run.yaml", "run.yml"):
        assert parse([f"--config={written(AS_YAML, name)}"]) == replace(want, compile="off")
    as_json = written(text(want), "config.json")
    assert parse(["--config", as_json]) == want
    assert parse(["--config", written("")]) == parse(["--config", written("", "a.yml")])


def test_flags_of_the_command_line_come_on_top(written):
    at = ["--config", written(SAME)]
    for argv in (["--steps=8", *at], [*at, "--steps", "8"]):
        assert parse(argv) == replace(parse(FLAGS), steps=8)
    assert parse([*at, "--no-simulate", "--micro_batch=None"]).simulate is False
    assert parse([*at, "--model.layers=5"]).model == replace(preset("gpt2-124m"), layers=5)
    assert parse([*at, "--model", "tiny"]).model == RunConfig().model  # a preset is a whole model
    assert parse(["--config", written('model = "gpt2-124m"')]).model == preset("gpt2-124m")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("stpes = 3", ["stpes: unknown key; did you mean steps?"]),
        ("[optim]\nlearning_rate = 1", ["optim.learning_rate: unknown key; did you mean optim.lr"]),
        ("[optim]\nclip = 1", ["optim.clip: was replaced; use optim.max_grad_norm"]),
        ("[optimm]", ["optimm: unknown key"]),
        ("xyzzy = 1", ["xyzzy: unknown key", "--help"]),
        ("steps = 'x'", ["steps is 'x': must be a whole number"]),
        ("steps = 3.0", ["steps is 3.0: must be a whole number"]),
        ("steps = true", ["steps is True: must be a whole number"]),
        ("simulate = 1", ["simulate is 1: must be true or false"]),
        ("zero = 4", ["zero is 4: must be one of 0, 1, 2, 3"]),
        ("resume = 'yes'", ["resume is 'yes': must be one of 'off', 'on', 'auto'"]),
        ("micro_batch = []", ["micro_batch is []: must be a whole number or 'None'"]),
        ("micro_batch = 1\nmicro-batch = 1", ["micro-batch: is given twice"]),
        ("optim = 3", ["optim is 3: must be a table of keys, as optim.name"]),
        ("[steps]\nx = 1", ["steps: must be a whole number, and no table"]),
        ("model = 3", ["model is 3: must be a table"]),
        ("model = 'lama'", ["--model lama"]),
        ("steps = 0", ["--steps 0: must be at least 1"]),
        ("[model]\nlayers = 0", ["model.layers=0"]),
        ("recompute = 'budget=0.5'", ["was replaced; use --recompute budget"]),
        ("steps", ["cannot be read as TOML", "at end of document"]),
        ("a = DEEP", ["cannot be read as TOML"]),
        (b"run_dir = '\xff'", ["is not UTF-8 (byte 11 is 0xff)"]),
    ],
)
def test_a_mistake_in_toml_is_one_line_with_file_and_key(content, parts, written):
    file = written(content.replace("DEEP", DEEP) if isinstance(content, str) else content)
    message = refused("--config", file)
    assert message.startswith(f"{file}: ") and all(part in message for part in parts)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("a: &x 1\nb: *x", "line 1: anchors, aliases and tags are not allowed"),
        ("a: !!python/object/apply:os.getcwd []", "tags are not allowed"),
        ("steps: 1\nsteps: 2", "line 1: a key must be a name, and each name once"),
        ("? [a, b]\n: 1", "a key must be a name"),
        ("steps: 1\n  x: 2", "line 2"),
        ("- 1", "must have keys with values"),
        ("optim:", "optim is None: must be a table"),
        ("steps: 017", "steps is '017': must be a whole number"),
        ("a: 1\n---\nb: 1", "single document"),
        ("DEEP", "cannot be read as YAML"),
    ],
)
def test_a_mistake_in_yaml_is_one_line(content, part, written):
    file = written(content.replace("DEEP", DEEP), "run.yaml")
    assert refused("--config", file).startswith(f"{file}: ") and part in refused("--config", file)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path, written):
    assert "No such file" in refused("--config", str(tmp_path / "none.toml"))
    assert "must end in .toml, .yaml" in refused("--config", written("", "run.txt"))
    (tmp_path / "a.toml").mkdir()
    assert "directory" in refused("--config", str(tmp_path / "a.toml"))
    assert "given twice" in refused("--config", written(SAME), f"--config={written(SAME)}")
    for argv in (["--config"], ["--config", "--steps=3"], ["--config="]):
        assert refused(*argv).startswith("--config: needs a file")
    assert "cannot be read as JSON" in refused("--config", written("[1]", "a.json"))


def test_a_mistake_on_the_command_line_does_not_name_the_file(written):
    at = ["--config", written("steps = 3")]
    assert refused(*at, "--seed=-1").startswith("--seed -1")
    assert refused(*at, "--stpes=3").startswith("--stpes=3: unknown flag")
    assert refused(*at, "--model.layers=0").startswith("model.layers=0")


def test_a_file_of_train_serves_the_other_commands(written):
    file = written(SAME)
    assert parse(["--config", file], PlanConfig()).optim.lr == 3e-4
    assert parse(["--config", file, "--zero=3"], ShowConfig()).model.layers == 4
    assert "steps is 'x'" in refused("--config", written("steps = 'x'"), default=ShowConfig())
    whole = written(toml_text(asdict(RunConfig())))
    assert parse(["--config", whole], ShowConfig()).model == RunConfig().model
    assert "gpu: unknown key" in refused("--config", written("gpu = 'h200'"))


def test_verify_takes_a_whole_config(capsys, written):
    """The part of the step. A line names what is left out: sections, and keys that are not as
    usual. A value that no command takes is refused, and so is an unknown name."""
    config = replace(RunConfig(), zero=3, optim=replace(RunConfig().optim, lr=0.5))
    file = written(toml_text(asdict(config)))
    assert parse(["--config", file, "--seed=4"], VerifyConfig()) == replace(
        VerifyConfig(), mesh="", zero=3, batch=16, seed=4, optim=config.optim
    )
    assert capsys.readouterr().err == f"{file}: train.py has no flags for [data]; left out\n"
    more = "compile = 'on'\nbatch = '8:0, 16:1K'\nsteps = 5\nzero3_gather = 'step'\n"
    assert parse(["--config", written(more)], VerifyConfig()) == VerifyConfig()
    assert "has no flags for compile, batch, steps; left out\n" in capsys.readouterr().err
    assert parse(["--config", written("compile = true")], VerifyConfig()).compile
    assert not capsys.readouterr().err
    for wrong in ("compile = 3", "steps = 'x'", "stpes = 1", "data.sek_len = 1", "wall = 1"):
        assert wrong.partition(" ")[0] in refused(
            "--config", written(wrong), default=VerifyConfig()
        )


def test_a_file_may_resume_and_name_the_run(tmp_path, written):
    file = written(f"resume = 'on'\nrun_dir = {json.dumps(str(tmp_path))}")
    (tmp_path / "config.json").write_text(text(RunConfig(steps=9)))
    saved = tmp_path / "checkpoints" / "step-00000002"
    saved.mkdir(parents=True)
    (saved / "meta.json").write_text("{}")
    assert parse(["--config", file]) == RunConfig(steps=9, resume="on", run_dir=str(tmp_path))


# ---- printed configs


def printed(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(argv)
    out, err = capsys.readouterr()
    assert not stop.value.code and not err
    return out


def values(hint) -> st.SearchStrategy:
    """Values of a field. Many are refused beside others, and drawn again."""
    if typing.get_origin(hint) in (typing.Union, UnionType):
        return st.one_of(*map(values, typing.get_args(hint)))
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(typing.get_args(hint))
    number = st.sampled_from([1e-5, 1 / 3, 0.5]) | st.floats(0, 1)
    texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
    whole = st.integers(1, 64)
    kinds = {bool: st.booleans(), int: whole, float: number, type(None): st.none()}
    return kinds.get(hint, texts)


FIELDS = {k: v for k, v in fields_of(RunConfig).items() if k not in ("init_from", "resume")}


@st.composite
def configs(draw) -> RunConfig:
    """A config that a command line can make."""
    name = draw(st.sampled_from(sorted(PRESETS)))
    base = dotted(asdict(replace(RunConfig(), model=preset(name))))
    for key in draw(st.sets(st.sampled_from(sorted(FIELDS)), max_size=4)):
        base[key] = draw(values(FIELDS[key]))
    try:
        config = _build(RunConfig, nested(base))
        check_values(config)
    except UserError:
        assume(False)
    return config


def assert_printed_is_read(config: RunConfig, folder: Path) -> None:
    file = folder / "run.toml"
    file.write_text(toml_text(asdict(config)), encoding="utf-8")
    assert parse(["--config", str(file)]) == config


@settings(
    max_examples=examples(20, thorough=1000)
)  # a parser of all flags takes a tenth of a second
@example(config=RunConfig(run_dir='a "b"\\ \x7f\n\tü=#', mesh="None"))
@given(config=configs())
def test_a_printed_config_gives_the_same_config(config, tmp_path_factory):
    assert_printed_is_read(config, tmp_path_factory.getbasetemp())


def test_a_print_of_few_digits_is_caught(tmp_path):
    """Mutant: numbers are rounded."""
    short = lambda x: json.dumps(round(x, 12) if isinstance(x, float) else x)
    config = replace(RunConfig(), optim=replace(RunConfig().optim, lr=1 / 3))
    with mock.patch.object(config_file, "_value", lambda x: short("None" if x is None else x)):
        assert_caught(lambda: assert_printed_is_read(config, tmp_path))


def test_print_config_prints_and_exits(capsys, written):
    out = printed(capsys, "--config", written(SAME), "--print-config", "--steps=8")
    assert parse(["--config", written(out, "b.toml")]) == replace(parse(FLAGS), steps=8)
    assert 'resume = "on"' in printed(capsys, "--print_config", "--resume")
    assert refused("--print-config", "--steps=0").startswith("--steps 0")
