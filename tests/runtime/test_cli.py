"""The command line: every flag is understood, and every mistake is one line with the typed text."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.layers.rope import RopeConfig
from dtron.model.presets import PRESETS, preset
from dtron.runtime.cli import EXAMPLES, load, parse, save
from dtron.runtime.config import DataConfig, ModelConfig, RunConfig
from dtron.runtime.exit import run_cli
from dtron.runtime.flags import OF_EVERY_COMMAND, flags_of
from tests.helpers.examples import examples

KNOWN = ["--model", *OF_EVERY_COMMAND, *flags_of(RunConfig)]
EVERYDAY = [
    "--mesh",
    "--model",
    "--zero",
    "--steps",
    "--seed",
    "--batch",
    "--micro-batch",
    "--run-dir",
]
EVERYDAY += ["--resume", "--save-every", "--simulate", "--device", "--dtype"]


def refused(*argv: str) -> str:
    """The message of a UserError, which has one line."""
    with pytest.raises(UserError) as caught:
        parse(argv)
    message = str(caught.value)
    assert type(caught.value) is UserError and message == " ".join(message.split())
    assert not set(message) & set("│╭╰─\x1b")
    return message


def parsed(line: str) -> RunConfig:
    return parse(line.split())


def test_nothing_said_is_the_defaults():
    assert parse([]) == RunConfig()
    other = RunConfig(steps=7, data=DataConfig(seq_len=32))
    assert parse([], other) == other
    assert parse(["--steps", "8"], other) == replace(other, steps=8)


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        ("--mesh dp=2,tp=2", "mesh", "dp=2,tp=2"),
        ("--mesh=dp=2,tp=2", "mesh", "dp=2,tp=2"),
        ("--model llama3.2-1b", "model", PRESETS["llama3.2-1b"]),
        ("--model=gpt2-124m", "model", PRESETS["gpt2-124m"]),
        ("--zero 3", "zero", 3),
        ("--steps 9", "steps", 9),
        ("--steps=9", "steps", 9),
        ("--seed 5", "seed", 5),
        ("--batch 64", "batch", 64),
        ("--micro-batch 2", "micro_batch", 2),
        ("--micro-batch None", "micro_batch", None),
        ("--run-dir some/where_else", "run_dir", "some/where_else"),
        ("--resume", "resume", "on"),
        ("--resume auto", "resume", "auto"),
        ("--resume=auto --resume", "resume", "on"),
        ("--resume --resume off", "resume", "off"),
        ("--save-every 10", "save_every", 10),
        ("--simulate", "simulate", True),
        ("--device cpu", "device", "cpu"),
        ("--dtype float64", "dtype", "float64"),
        ("--recompute selective", "recompute", "selective"),
        ("--cp-method ulysses", "cp_method", "ulysses"),
        ("--reduce-dtype bfloat16", "reduce_dtype", "bfloat16"),
        ("--fp8 rowwise", "fp8", "rowwise"),
        ("--fp8-first-last", "fp8_first_last", True),
        ("--attention-kernel flex", "attention_kernel", "flex"),
        ("--sample-tokens 0", "sample_tokens", 0),
        ("--micro_batch 2 --run_dir a_b", "run_dir", "a_b"),
        ("--steps 3 --steps 4", "steps", 4),
    ],
)
def test_a_flag_sets_its_field(argv, field, value):
    got = parsed(argv)
    assert getattr(got, field) == value
    rest = {"micro_batch": got.micro_batch} if "micro_batch" in argv else {}
    assert got == replace(RunConfig(), **{field: value}, **rest)


def test_dotted_flags_override_one_field_of_a_group():
    line = "--model.layers 4 --optim.lr 3e-4 --data.path x --data.document-mask --model.window 8"
    got = parsed(line)
    base = RunConfig()
    assert got == replace(
        base,
        model=replace(base.model, layers=4, window=8),
        optim=replace(base.optim, lr=3e-4),
        data=replace(base.data, path="x", document_mask=True),
    )
    assert parse(["--model.rope.theta", "5e5"]).model == replace(
        ModelConfig(), rope=RopeConfig(5e5)
    )


@pytest.mark.parametrize("spelling", ["kv-heads", "kv_heads"])
def test_a_preset_and_its_overrides_come_in_any_order(spelling):
    want = replace(preset("llama3-8b"), layers=2, kv_heads=4)
    override = ["--model.layers", "2", f"--model.{spelling}=4"]
    for name in (["--model", "llama3-8b"], ["--model=llama3-8b"]):
        assert parse([*name, *override]).model == parse([*override, *name]).model == want


def test_a_preset_given_twice_is_the_last():
    assert parsed("--model llama3-8b --model gpt2-124m --seed 1").model == preset("gpt2-124m")


def typos(flag: str) -> set[str]:
    """A flag with one letter missing, wrong or swapped with the next, anywhere after the dashes."""
    places = range(2, len(flag))
    made = {flag[:i] + middle + flag[i + 1 :] for i in places for middle in ("", "q")}
    made |= {flag[:i] + flag[i + 1] + flag[i] + flag[i + 2 :] for i in places[:-1]}
    return made - set(KNOWN)


def alike(flag: str) -> set[str]:
    """The flags that differ from this flag by that letter only."""
    letters = lambda f: sum(a != b for a, b in zip(f, flag, strict=True))
    return {f for f in KNOWN if len(f) == len(flag) and letters(f) <= 1}


@pytest.mark.parametrize("flag", KNOWN)
def test_every_typo_of_a_flag_names_the_flag(flag):
    near = alike(flag)
    made = sorted(
        typos(flag)
    )  # hundreds for each flag: some of each kind, all in a thorough profile
    for typo in made[:: max(1, len(made) // examples(8, thorough=len(made)))]:
        # beta1 or beta2, nope-dim or rope-dim; or a flag that is the typo without a letter.
        meant = near | {typo[:i] + typo[i + 1 :] for i in range(len(typo))}.intersection(KNOWN)
        assert refused("--steps", "3", typo, "1") in {
            f"{typo}: unknown flag; did you mean {f}?" for f in meant
        }


def test_a_typo_is_named_as_it_was_typed():
    for argv in (["--stpes"], ["--stpes", "3"], ["--seed", "1", "--stpes"]):
        assert refused(*argv) == "--stpes: unknown flag; did you mean --steps?"
    assert refused("--stpes=3").startswith("--stpes=3: unknown flag; did you mean --steps?")
    assert refused("--run_dri", "x") == "--run_dri: unknown flag; did you mean --run-dir?"


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ("--steps x", ["--steps", "'x'"]),
        ("--steps", ["--steps", "Missing value"]),
        ("--steps 1.5", ["--steps", "'1.5'"]),
        ("--steps 0", ["--steps 0", "--steps 1"]),
        ("--batch 0", ["--batch 0", "--batch 1"]),
        ("--save-every -1", ["--save-every -1", "--save-every 0"]),
        ("--log-every 0", ["--log-every 0", "--log-every 1"]),
        ("--zero 4", ["--zero", "'4'", "'3'"]),
        ("--zero=x", ["--zero", "'x'"]),
        ("--device tpu", ["--device", "'tpu'", "'cpu'"]),
        ("--dtype float16", ["--dtype", "'float16'", "'bfloat16'"]),
        ("--micro-batch x", ["--micro-batch", "'x'"]),
        ("--mesh", ["--mesh", "Missing value"]),
        ("--run-dir --resume", ["--run-dir", "Missing value"]),
        ("--model", ["--model:", "needs a value"]),
        ("--model --steps 3", ["--model:", "needs a value"]),
        ("--model lama3-8b", ["--model lama3-8b", "llama3-8b"]),
        ("--model.layers 0", ["model.layers=0", "from 1"]),
        ("--model.layers", ["--model.layers", "Missing value"]),
        ("--model.heads 6", ["model.heads=6", "--model.kv-heads 3"]),
        ("--model.head-dim 3", ["model.head_dim=3", "even"]),
        ("--model.activation relu", ["--model.activation", "'relu'", "'relu2'"]),
        ("--model.window 0", ["model.window=0", "None"]),
        ("--model.window x", ["--model.window", "'x'"]),
        ("--model.rope.scaling ntk", ["--model.rope.scaling", "'ntk'", "'yarn'"]),
        ("--model.rope.theta 0", ["rope", "theta=0.0"]),
        ("--optim.lr -1", ["optim.lr=-1.0", "from 0"]),
        ("--optim.lr nan", ["optim.lr=nan", "from 0"]),
        ("--optim.lr fast", ["--optim.lr", "'fast'"]),
        ("--optim.beta2 1.5", ["optim.beta2=1.5", "under 1"]),
        ("--optim.schedule step", ["--optim.schedule", "'step'", "'wsd'"]),
        ("--data.seq-len 0", ["data.seq_len=0", "at least 1"]),
        ("--data.validation-ratio 1", ["data.validation_ratio=1.0", "between 0 and 1"]),
        ("--seed -1", ["seed"]),
        ("--run-dir=", ["--run-dir ''", "--run-dir runs/a"]),
        ("--seed 99999999999999999999999", ["--seed 99999999999999999999999", "at most"]),
        ("--timeout-seconds 99999999999999", ["--timeout-seconds 10000000"]),
        ("--model.init-std -1", ["model.init_std"]),
        ("--simulate yes", ["yes"]),
        ("--resume yes", ["--resume", "'yes'", "'auto'"]),
        ("--no-resume", ["--no-resume: was replaced; use --resume off"]),
        ("stray", ["stray"]),
        ("--mesh dp=2 tp=2", ["tp=2"]),
        ("-x", ["-x: unknown flag"]),
        ("--xyzzy", ["--xyzzy: unknown flag", "see --help"]),
    ],
)
def test_a_bad_value_is_one_line_with_its_flag(argv, parts):
    message = refused(*argv.split())
    for part in parts:
        assert part in message


BOOLS = {flag.replace("no-", "", 1) for flag in KNOWN if re.search(r"[-.]no-", flag)}


SWITCHES = [flag for flag in KNOWN if flag.replace(".no-", ".").replace("--no-", "--") in BOOLS]


def test_each_switch_has_an_opposite():
    assert len(SWITCHES) == 2 * len(BOOLS)


@settings(max_examples=examples(12, thorough=1000))  # a parser takes a tenth of a second
@given(
    st.sampled_from(sorted({*KNOWN} - {*SWITCHES, *OF_EVERY_COMMAND, "--resume"} | {"--config"}))
)
def test_every_flag_that_takes_a_value_demands_one(flag):
    assert flag in refused("--seed", "1", flag)


# ---- run_cli


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def raising(error: BaseException):
    def main(argv: list[str]) -> int:
        raise error

    return main


def test_run_cli_passes_the_arguments_and_the_exit_code(capsys):
    seen = []
    assert run_cli(lambda argv: seen.append(argv) or 7, ["--steps", "1"]) == 7
    assert seen == [["--steps", "1"]] and capsys.readouterr() == ("", "")


def test_run_cli_makes_a_value_error_one_line(capsys):
    """A UserError is one line. An error of a library is a bug of dtron, and keeps its traceback."""
    assert run_cli(lambda argv: MeshShape.parse("dp=0"), []) == 2
    assert capsys.readouterr().err.startswith("error: mesh 'dp=0': dp has size '0'")
    with pytest.raises(ValueError, match="first"):
        run_cli(raising(ValueError("first\n   second")), [])
    assert run_cli(lambda argv: parse(argv).steps, ["--stpes", "3"]) == 2
    assert capsys.readouterr() == ("", "error: --stpes: unknown flag; did you mean --steps?\n")


def test_run_cli_says_stopped_when_interrupted(capsys):
    assert run_cli(raising(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr() == ("", "stopped\n")


@pytest.mark.parametrize(
    "error", [RuntimeError("bug"), TypeError("bug"), KeyError("bug"), OSError("bug")]
)
def test_run_cli_lets_every_other_error_through(error, capsys):
    with pytest.raises(type(error)) as caught:
        run_cli(raising(error), [])
    assert caught.value is error and capsys.readouterr() == ("", "")


# ---- saved configs


@pytest.mark.parametrize("name", PRESETS)
def test_a_saved_config_loads_as_the_same(name, tmp_path):
    config = parse(
        ["--model", name, "--micro-batch", "2", "--mesh", "tp=2", "--data.path", 'a "b" ü.txt']
    )
    save(config, tmp_path / "config.json")
    assert load(tmp_path / "config.json") == config != RunConfig()
    assert load(tmp_path / "config.json").model == preset(name)


# ---- help


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_every_flag_and_the_examples(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--steps", "3", flag])
    out, err = capsys.readouterr()
    assert not stop.value.code and not err
    for known in {*EVERYDAY, *KNOWN} - {"--version"}:
        assert re.search(rf"(?<![\w.-]){re.escape(known)}(?![\w-])", out), known
    assert out.rstrip().endswith(EXAMPLES) and "usage: train.py" in out
    assert max(map(len, out.splitlines())) <= 110


def test_the_examples_parse():
    for line in EXAMPLES.splitlines()[1:]:
        words = line.split()
        assert parse(words[words.index("train.py") + 1 :]) != RunConfig()


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--version"])
    assert not stop.value.code and re.fullmatch(r"dtron \d+\.\d+\.\d+\n", capsys.readouterr().out)
