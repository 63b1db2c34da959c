"""The command line: every field of a config is a flag, and every error is one line.

tyro makes the flags from the config's dataclasses, with types, choices and help. Its error messages
fill a screen, so this module shortens them to one line with the remedy.

``--model NAME`` selects a preset, and ``--model.FIELD`` overrides a field of the preset, in any
order. The name is parsed first and becomes the default of the other flags.

``--config FILE`` puts the flags of a file before those of the command line (config_file.py).
"""

import contextlib
import io
import json
import os
import re
import sys
import typing
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from dtron import __version__, checkpoint
from dtron.data.indexed import prefix_of
from dtron.errors import UserError
from dtron.hf.config import CONFIG
from dtron.json_files import is_there, read_object
from dtron.model.config import ModelConfig
from dtron.model.lora import LoraConfig
from dtron.model.presets import preset
from dtron.renamed import current_tree, refuse_old_flags
from dtron.runtime.check_values import check_path, check_values
from dtron.runtime.config import RunConfig
from dtron.runtime.config_file import take_file, toml_text
from dtron.runtime.flags import OF_EVERY_COMMAND, flags_of, nearest, parsed_class
from dtron.runtime.resume import check_source, of_this_start, place_of_run, with_value

# What ``load`` raises for a file that is no config. (UserError is a ValueError.)
UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)

PRINT = "--print-config"
EXAMPLES = """examples:
  python train.py --model.layers 6 --optim.lr 5e-4
  torchrun --nproc-per-node 4 train.py --mesh dp=2,tp=2 --zero 3
  python train.py --simulate --mesh dp=8,tp=4 --steps 2
  python train.py --data.path my_text.jsonl --data.tokenizer tokenizer.json --model llama3.2-1b"""


def parse(argv: Sequence[str], default: Any = None, prog: str = "train.py") -> Any:
    """Parse the arguments into a config: ``default`` with the given fields changed.

    ``default``: a frozen dataclass with a ``model``; None: a RunConfig. If it has an ``output``,
        ``-o`` is short for this flag.

    Raises UserError, in one line, for an unknown flag or a bad value. ``--help``, ``--version`` and
    ``--print-config`` print and exit.
    """
    default = default or RunConfig()
    argv, file = take_file(argv, type(default))
    rest = [word for word in argv if word.replace("_", "-") != PRINT]
    try:
        config = _parsed([*(file.words if file else ()), *rest], default, prog)
    except UserError as error:
        raise (file.explain(error) if file else error) from None
    if file and (note := file.note(prog)):
        print(note, file=sys.stderr)
    if len(rest) < len(argv):
        print(toml_text(asdict(config)), end="")
        raise SystemExit(0)
    return config


def _parsed(argv: Sequence[str], default: Any, prog: str) -> Any:
    import tyro  # a slow import that only command lines need

    config_class: Any = type(default)
    from dtron.hf.hub import with_folders

    argv = with_folders(with_value(argv), ("--init-from", "--lora.adapter"))
    if "--version" in argv:
        print(f"dtron {__version__}")
        raise SystemExit(0)
    known = ["--model", "-h", *OF_EVERY_COMMAND, *flags_of(config_class)]
    if "--output" in known:
        argv = ["--output" + x[2:] if re.match(r"-o(=|$)", x) else x for x in argv]
    _check_flags(argv, known)
    command_line = parsed_class(config_class, argv)
    name, loaded = _value_of(argv, "--model", example="tiny"), None
    previous = _resumed(argv) if "--resume" in known else None
    default = previous or default
    if previous is None and "--init-from" in known and (folder := _source(argv)) is not None:
        loaded = _loaded(folder, name)
        default = replace(default, model=loaded)
    if name is not None:
        default = replace(default, model=preset(name))
    updates = _value_of(argv, "--lora.adapter", "FOLDER") if "--lora.adapter" in known else None
    if updates and previous is None:
        default = replace(default, lora=_updates(updates, _source(argv)))
    values = _shallow(default)
    named = {f.name: values[f.name] for f in fields(command_line) if f.name in values}
    start = command_line(**named, preset=name or "tiny")
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            parsed = tyro.cli(
                command_line,
                args=list(argv),
                default=start,
                prog=prog,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        if not stop.code:
            examples = f"\n\n{EXAMPLES}" if prog == "train.py" else ""
            print(printed.getvalue().rstrip() + examples)
            raise
        raise UserError(_one_line(printed.getvalue())) from None
    values |= _shallow(parsed)
    del values["preset"]
    config = config_class(**values)
    check_values(config)
    if updates and previous is None and config.lora != default.lora:
        raise UserError(
            f"--lora.adapter {updates}: gives rank, alpha and targets of the updates; drop the "
            "other flags of --lora"
        )
    return config if loaded is None else _with_tokenizer(config, loaded)


def _resumed(argv: Sequence[str]) -> RunConfig | None:
    """Return the config of the run that the arguments resume; None if they begin a run."""
    run_dir = _value_of(argv, "--run-dir") or RunConfig().run_dir
    store = _value_of(argv, "--checkpoint-store")
    file, previous, reason = Path(run_dir) / CONFIG, RunConfig(), ""
    if _value_of(argv, "--resume") not in ("on", "auto") or not os.path.lexists(file):
        return None
    try:
        previous = load(file)
    except UNREADABLE as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
    if checkpoint.newest(place_of_run(store or previous.checkpoint_store, Path(run_dir))) is None:
        return None
    if reason:
        raise UserError(
            f"{file}: --resume cannot read the config of the run ({reason}); restore the file, or "
            "delete it and give all flags of the run"
        )
    check_source(_source(argv), previous)
    return of_this_start(previous, run_dir)


def _source(argv: Sequence[str]) -> str | None:
    """Return the folder of ``--init-from``; None for no folder. Raises UserError for the flag
    without a value."""
    folder = _value_of(argv, "--init-from", example="FOLDER")
    return None if folder == "None" else folder  # as tyro reads it


def _loaded(folder: str, name: str | None) -> ModelConfig:
    """Read the model config of the ``--init-from`` folder."""
    from dtron.hf import read_model

    check_path("--init-from", folder)
    if name is not None:
        raise UserError(
            f"--model {name} --init-from {folder}: its config.json is the model; drop --model"
        )
    return read_model(Path(folder))[1]


def _updates(folder: str, base: str | None) -> LoraConfig:
    """Read the config of the ``--lora.adapter`` folder.

    ``base``: the folder of its model."""
    from dtron.hf import read_model
    from dtron.hf.adapter import Adapter

    check_path("--lora.adapter", folder)
    if base is None:
        raise UserError(
            f"--lora.adapter {folder}: has the updates of a model; give the model's folder too, "
            "with --init-from"
        )
    return Adapter(folder, *read_model(Path(base))).config


def _with_tokenizer(config: RunConfig, loaded: ModelConfig) -> RunConfig:
    """Return the config with the tokenizer of the ``--init-from`` model. Raises UserError if flags
    contradict this model."""
    from dtron.hf import contradiction

    assert config.init_from is not None
    folder = Path(config.init_from)
    wrong = contradiction(config.model, loaded)
    if wrong:
        name, theirs, ours = wrong
        flag = f"--model.{name.replace('_', '-')}"
        raise UserError(
            f"{flag} {ours}: the model of --init-from {folder} has {theirs}"
            f"{', and a vocabulary can only grow' if name == 'vocab' else ''}; drop {flag}"
        )
    d = config.data
    if d.tokenizer is not None or (d.path is not None and prefix_of(d.path)):
        return config
    file = folder / "tokenizer.json"
    if not is_there(file):
        raise UserError(f"--init-from {folder}: has no tokenizer.json; give --data.tokenizer")
    return replace(config, data=replace(d, tokenizer=str(file)))


def _shallow(config: Any) -> dict[str, Any]:
    """Return the fields of a config, without converting nested configs."""
    return {f.name: getattr(config, f.name) for f in fields(config)}


def save(config: RunConfig, path: Path) -> None:
    """Write the resolved config as JSON."""
    path.write_text(text(config))


def text(config: RunConfig) -> str:
    """Return the resolved config as JSON."""
    return json.dumps(asdict(config), indent=1) + "\n"


def load(path: Path) -> RunConfig:
    """Read a config written by ``save``, of this version or an older one."""
    return _build(RunConfig, current_tree(read_object(path)))


def _build(cls: Any, value: Any, path: str = "") -> Any:
    """Build a config from nested values. Raises TypeError for a value of another type, and
    KeyError for a name that is no field."""
    if not is_dataclass(cls):
        try:
            return msgspec.convert(value, cls)
        except msgspec.ValidationError as error:
            raise TypeError(f"{path} is {value!r:.60}") from error
    make: Any = cls
    if not isinstance(value, dict):
        raise TypeError(f"{path or 'the file'} is no object")
    hints = typing.get_type_hints(cls)
    inner = {
        name: _build(hints[name], v, f"{path}.{name}".lstrip(".")) for name, v in value.items()
    }
    return make(**inner)


def _check_flags(argv: Sequence[str], known: Sequence[str]) -> None:
    refuse_old_flags(argv, known)
    for word in argv:
        flag = word.partition("=")[0].replace("_", "-")
        if word.startswith("-") and not re.match(r"-[\d.]", word) and flag not in known:
            near = nearest(flag.lower(), known)
            raise UserError(
                f"{word}: unknown flag; " + (f"did you mean {near}?" if near else "see --help")
            )


def _value_of(argv: Sequence[str], flag: str, example: str = "") -> str | None:
    """Return the last value of a flag, or None without the flag.

    ``example``: a value for the UserError about a flag without a value; empty: return None, because
        tyro refuses the flag later."""
    found = None
    for word, following in zip(argv, [*argv[1:], None], strict=False):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") != flag:
            continue
        if equals:
            found = value
        elif following is not None and not following.startswith("--"):
            found = following
        elif example:
            raise UserError(f"{flag}: needs a value, as in {flag} {example}; see --help")
    return found


def _one_line(box: str) -> str:
    """Return the text of tyro's error box without its frame, title and hints."""
    text = re.sub(r"\x1b\[[\d;]*m", "", box)
    rows = [re.sub(r"^[\s│|╭╰]+|[\s│|╮╯]+$", "", row) for row in text.splitlines()]
    parts: list[list[str]] = []
    part: list[str] = []
    for row in rows:
        if row and set(row) <= set("-─═ "):
            parts.append(part)
            part = []
        elif row:
            part.append(row)
    body = " ".join(parts[1] if len(parts) > 1 and parts[1] else (parts or [part])[0])
    body = re.sub(r"\s+([.,])", r"\1", body).removeprefix("Error parsing ").rstrip(".")
    # The error message of a config follows the name of the config's group.
    group = re.match(r"\w+: (?=--|\w+\.\w+=)", body)
    return body[group.end() :] if group else f"{body}; see --help"
