"""Old names: a command line answers with the new flag, and files of older versions are read."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtron import renamed
from dtron.checkpoint import newest
from dtron.errors import UserError
from dtron.json_files import read_object
from dtron.renamed import RENAMED, current, current_tree, dotted, nested
from dtron.runtime.cli import load, parse
from dtron.runtime.config import RunConfig, identity_of
from dtron.runtime.exit import Parser, run_cli
from dtron.runtime.flags import flags_of
from dtron.runtime.metrics import Metrics, Throughput
from dtron.schedules.__main__ import main as schedules
from dtron.testing import assert_caught
from dtron.tools.show import ShowConfig
from dtron.tools.verify import VerifyConfig
from tests.helpers.paths import FIXTURES, ROOT

OLD_RUN = FIXTURES / "run-fdfba95"

# Old field, its value in config.json, the old flag and the new one. They are written out, not
# derived from the table under test.
FIELDS = [
    ("schedule", "zb-v", "--schedule zb-v", "--pipeline.schedule zb-v"),
    ("pipeline.virtual", 3, "--pipeline.virtual 3", "--pipeline.stages-per-rank 3"),
    ("pipeline.split", "1,3", "--pipeline.split 1,3", "--pipeline.layers 1,3"),
    (
        "pipeline.gather",
        "microbatch",
        "--pipeline.gather microbatch",
        "--zero3-gather microbatch",
    ),
    ("cp", "ulysses", "--cp ulysses", "--cp-method ulysses"),
    ("dispatch", "static", "--dispatch static", "--moe-dispatch static"),
    ("attention", "flex", "--attention flex", "--attention-kernel flex"),
    ("graph", "off", "--graph off", "--cuda-graph off"),
    ("reduce_bf16", True, "--reduce-bf16", "--reduce-dtype bfloat16"),
    ("reduce_bf16", False, "--no-reduce-bf16", "--reduce-dtype float32"),
    ("fp8_ends", True, "--fp8-ends", "--fp8-first-last"),
    ("fp8_ends", False, "--no-fp8-ends", "--no-fp8-first-last"),
    ("fp8_smallest", 7, "--fp8-smallest 7", "--fp8-min-weights 7"),
    ("max_skips", 3, "--max-skips 3", "--max-nonfinite-steps 3"),
    ("sample", 0, "--sample 0", "--sample-tokens 0"),
    ("timeout", 60, "--timeout 60", "--timeout-seconds 60"),
    ("tensorboard", True, "--tensorboard", "--track tensorboard"),
    ("tensorboard", False, "--no-tensorboard", "--track none"),
    (
        "recompute",
        "budget=0.5",
        "--recompute budget=0.5",
        "--recompute budget --recompute-budget 0.5",
    ),
    ("optim.min_lr", 0.2, "--optim.min-lr 0.2", "--optim.min-lr-ratio 0.2"),
    ("optim.decay", 0.3, "--optim.decay 0.3", "--optim.wsd-decay-ratio 0.3"),
    ("optim.clip", 0.5, "--optim.clip 0.5", "--optim.max-grad-norm 0.5"),
    (
        "model.moe.capacity",
        1.25,
        "--model.moe.capacity 1.25",
        "--model.moe.capacity-factor 1.25",
    ),
    ("data.sequence", 64, "--data.sequence 64", "--data.seq-len 64"),
    ("data.validation", 0.1, "--data.validation 0.1", "--data.validation-ratio 0.1"),
]


# Programs other than train.py: an old command line and the new one.
def verify(argv):
    return parse(argv, VerifyConfig(), prog="python -m dtron.verify")


def show(argv):
    return parse(argv, ShowConfig(), prog="python -m dtron.show")


PROGRAMS = [
    ("verify", "sequence", "--sequence 64", "--seq-len 64"),
    ("verify", "cp", "--cp ring", "--cp-method ring"),
    ("verify", "schedule", "--schedule=zb-v", "--pipeline.schedule zb-v"),
    ("verify", "pipeline.gather", "--pipeline.gather step", "--zero3-gather step"),
    ("show", "cp", "--cp ring", "--cp-method ring"),
    ("schedules", "virtual", "draw zb-v --virtual 3", "--stages-per-rank 3"),
    ("train", "sequence", "--sequence 64", "--seq-len 64"),
    ("train", "no_graph", "--no-graph", "--cuda-graph off"),
    ("train", "cp", "--cp ring", "--cp-method ring"),
    ("train", "attention", "--attention flex", "--attention-kernel flex"),
    ("train", "fp8_ends", "--fp8-ends", "--fp8-first-last"),
    ("train", "reduce_bf16", "--reduce-bf16", "--reduce-dtype bfloat16"),
    (
        "train",
        "recompute",
        "--recompute=budget=0.25",
        "--recompute budget --recompute-budget 0.25",
    ),
    ("pipeline", "schedule", "--schedule zb-v", "--pipeline.schedule zb-v"),
    ("pipeline", "split", "--split 9,9", "--pipeline.layers 9,9"),
    ("context", "sequences", "--sequences 64 128", "--seq-lens 64"),
    ("context", "timeout", "--timeout 60", "--timeout-seconds 60"),
    ("kernels/experts", "dispatch", "--dispatch static", "--moe-dispatch static"),
    ("kernels/latent", "sequence", "--sequence 64", "--seq-len 64"),
]

# Metrics of metrics.jsonl, and metrics of benchmarks only.
RECORDS = [
    (
        "ahead.*.loss",
        {"ahead.1.loss": 2.5, "ahead.12.loss": 3.5},
        {"mtp.1.loss": 2.5, "mtp.12.loss": 3.5},
    ),
    ("data_wait", {"data_wait": 0.5}, {"data_wait_ratio": 0.5}),
    ("memory_gib", {"memory_gib": 1.5}, {"peak_memory_gib": 1.5}),
    ("save_seconds", {"save_seconds": 0.25}, {"checkpoint_stall_seconds": 0.25}),
    ("skipped", {"skipped": 2}, {"skipped_steps": 2}),
    ("sequence", {"sequence": 4096}, {"seq_len": 4096}),
    ("reduce", {"reduce": "bfloat16"}, {"reduce_dtype": "bfloat16"}),
]


def program(name: str):
    """The ``main`` of a program; benchmarks are no part of the package."""
    if name in ("verify", "show", "schedules"):
        return {"verify": verify, "show": show, "schedules": schedules}[name]
    folder = str(ROOT / "bench")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = spec_from_file_location(f"bench_{Path(name).name}", ROOT / "bench" / f"{name}.py")
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def check_flag(main, old: str, new: str) -> None:
    """Assert one line with the flag as typed, and the new flag."""
    with pytest.raises(UserError) as caught:
        main(["--seed=1", *old.split()] if main is parse else old.split())
    typed = old[old.index("--") :].replace(" 128", "")
    assert str(caught.value) == f"{typed}: was replaced; use {new}"


def check_field(tmp_path: Path, old: str, value, new: str) -> None:
    """config.json with the old field is the config of the new flag."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(nested({old: value, "steps": 7})))
    assert load(file) == parse(["--steps=7", *new.split()])


def check_record(old: dict, new: dict) -> None:
    assert current(old | {"step": 3, "experts.1.load_max": 1.5}) == new | {
        "step": 3,
        "experts.1.load_max": 1.5,
    }


def without(old: str):
    """The mutant: a table that has lost the row of this name."""
    return mock.patch.object(renamed, "RENAMED", tuple(r for r in RENAMED if r.old != old))


@pytest.mark.parametrize(("field", "value", "old", "new"), FIELDS)
def test_an_old_field(tmp_path, field, value, old, new):
    check_flag(parse, old, new)
    check_field(tmp_path, field, value, new)
    with without(field):
        assert_caught(lambda: check_flag(parse, old, new))
        with pytest.raises((KeyError, UserError, AssertionError)):
            check_field(tmp_path, field, value, new)


@pytest.mark.parametrize(("name", "field", "old", "new"), PROGRAMS)
def test_an_old_flag_of_another_program(name, field, old, new):
    main = program(name)
    check_flag(main, old, new)
    with without(field), pytest.raises((UserError, AssertionError)) as caught:
        check_flag(main, old, new)
    assert caught.type is not UserError


@pytest.mark.parametrize(("name", "old", "new"), RECORDS)
def test_an_old_record(name, old, new):
    check_record(old, new)
    with without(name):
        assert_caught(lambda: check_record(old, new))


def test_resume_was_a_switch(tmp_path):
    """The flag has kept its name, so only its values and ``--no-resume`` are old."""
    check_field(tmp_path, "resume", True, "--resume")
    check_field(tmp_path, "resume", False, "--resume off")
    check_flag(parse, "--no-resume", "--resume off")
    with without("resume"), pytest.raises(TypeError):
        check_field(tmp_path, "resume", True, "--resume")
    with without("no_resume"):
        assert_caught(lambda: check_flag(parse, "--no-resume", "--resume off"))


def test_every_row_of_the_table_is_tested():
    tested = {row[0] for row in FIELDS} | {row[1] for row in PROGRAMS} | {row[0] for row in RECORDS}
    assert {row.old for row in RENAMED} == tested | {"resume", "no_resume"}
    assert len({row.old for row in RENAMED}) == len(RENAMED)


# ---- the whole table


ROWS = st.sampled_from([row for row in RENAMED if "*" not in row.old])
VALUES = st.text(st.characters(codec="ascii", categories=("L", "N", "P", "Zs")), min_size=1).filter(
    lambda text: not text.startswith("--")
)


@given(row=ROWS, value=VALUES, joined=st.booleans(), underscores=st.booleans())
def test_no_old_flag_is_ever_accepted(row, value, joined, underscores):
    """With any value and in any spelling, unless the flag still has its name."""
    flag = "--" + (row.old if underscores else row.old.replace("_", "-"))
    known = flags_of(RunConfig)
    argv = [f"{flag}={value}"] if joined else [flag, value]
    new = set(row.now(True if row.switch else value))
    if new == {row.old} or not {"--" + n.replace("_", "-") for n in new} <= set(known):
        return
    with pytest.raises(UserError) as caught:
        renamed.refuse_old_flags(["--seed", "1", *argv], known)
    assert str(caught.value).startswith(f"{argv[0]}") and all(
        f"--{n.replace('_', '-')}" in str(caught.value) for n in new
    )


def test_every_field_of_an_older_run_is_a_flag_or_is_answered():
    """The fields are those of a config.json of that version, which was not written for this
    test."""
    known, old = flags_of(RunConfig), dotted(json.loads((OLD_RUN / "config.json").read_text()))
    gone = [f for f in old if "--" + f.replace("_", "-") not in known]
    assert len(gone) == 21  # and recompute, which still has its name
    for field in gone:
        with pytest.raises(UserError, match="was replaced; use --"):
            renamed.refuse_old_flags([f"--{field.replace('_', '-')}"], known)
    assert set(current(old)) < set(dotted(asdict(RunConfig())))


def test_no_flag_may_be_abbreviated():
    """An old flag is the beginning of a new one: --cp, --attention, --sample."""
    known = ("--model", *flags_of(RunConfig))
    for short in {flag[:n] for flag in known for n in range(3, len(flag))} - set(known):
        with pytest.raises(UserError, match=r"unknown flag|was replaced"):
            parse([short, "1"])


def test_a_parser_takes_no_abbreviation_and_answers_old_flags():
    p = Parser()
    p.add_argument("--cp-method")
    p.add_argument("--sample-words")
    assert p.parse_args(["--cp-method", "ring"]).cp_method == "ring"
    with pytest.raises(UserError, match="^--cp ring: was replaced; use --cp-method ring$"):
        p.parse_args(["--cp", "ring"])
    for other in ("--cp-m", "--sample"):  # the new name of the second flag is no flag here
        with pytest.raises(UserError, match="unrecognized arguments"):
            p.parse_args([other, "x"])


def test_an_old_flag_ends_a_program_with_one_line(capsys):
    assert run_cli(lambda argv: parse(argv).steps, ["--steps", "3", "--cp", "ring"]) == 2
    assert capsys.readouterr() == ("", "error: --cp ring: was replaced; use --cp-method ring\n")


def test_an_old_name_without_its_group_is_guessed():
    for old, new in (("--clip", "--optim.max-grad-norm"), ("--sequence", "--data.seq-len")):
        with pytest.raises(UserError, match=f"^{old}: unknown flag; did you mean {new}\\?$"):
            parse([old, "1"])


# ---- files


@given(st.dictionaries(st.sampled_from([*dotted(asdict(RunConfig()))]), st.integers()))
def test_new_names_stay(values):
    assert current(values) == values and dotted(nested(values)) == values
    assert current_tree(asdict(RunConfig())) == asdict(RunConfig())


def test_a_run_of_an_older_version_has_the_identity_of_its_config():
    config = load(OLD_RUN / "config.json")
    meta = read_object(newest(OLD_RUN) / "meta.json")
    meta["identity"] = current(meta["identity"])
    want = identity_of(config, meta["identity"]["text"])
    later = ("model.delta.", "model.mamba.", "model.indexer.", "lora.", "loss.")
    for name in (  # were not recorded: there was one value of each
        "optim.name",
        "model.pattern",
        "model.mla.norm_eps",
        "model.rope.attention_factor",
        "model.mup_base_width",
        "model.mup_base_head_dim",
        *(name for name in identity_of(config, "") if name.startswith(later)),
        "model.feed_forwards",
        "model.attention_gate",
        "model.norm_position",
        "model.post_norm_mixers",
        "model.window_kind",
        "model.attention_temperature",
        "model.attention_temperature_floor",
        "model.moe.scores_on",
        "model.qk_norm_over",
        "model.rope.partial",
        "model.window_rope_theta",
        "model.attention_scale",
        "model.embedding_scale",
        "model.residual_scale",
        "model.logit_scale",
        "model.final_softcap",
    ):
        del want[name]
    assert meta["identity"] == want


def test_metrics_of_an_older_version_go_on_under_the_new_names(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text((OLD_RUN / "metrics.jsonl").read_text())
    before = [json.loads(line) for line in file.read_text().splitlines()]
    Metrics(tmp_path, Throughput("cpu", 1, 1.0), 4, 2, True).close()
    after = [json.loads(line) for line in file.read_text().splitlines()]
    assert [a["step"] for a in after] == [1, 2]
    names = {
        "memory_gib": "peak_memory_gib",
        "data_wait": "data_wait_ratio",
        "skipped": "skipped_steps",
        "save_seconds": "checkpoint_stall_seconds",
    }
    for old, new in zip(before, after, strict=False):
        assert new == {names.get(name, name): value for name, value in old.items()} != old
