"""The flags of a config, and the dataclass from which tyro makes a parser of them."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass
from functools import cache
from typing import Annotated, Any, Literal

from dtron.model.presets import PRESETS
from dtron.renamed import last_component

_CONFIG_HELP = "flags from a file of TOML, YAML or JSON; flags on the command line override them"
_PRINT_HELP = "print the resolved config as TOML and exit"
OF_EVERY_COMMAND = ("--help", "--version", "--config", "--print-config")


@cache
def flags_of(config_class: type, prefix: str = "--") -> tuple[str, ...]:
    """Return every flag of a config class, as tyro spells them."""
    found: list[str] = []
    hints = _hints(config_class)
    for f in fields(config_class):
        name = f.name.replace("_", "-")
        if is_dataclass(hints[f.name]):
            found += flags_of(hints[f.name], f"{prefix}{name}.")
        else:
            found.append(prefix + name)
            if hints[f.name] is bool:
                found.append(f"{prefix}no-{name}")
    return tuple(found)


def parsed_class(config_class: Any, argv: Sequence[str]) -> Any:
    """Return a dataclass of the fields of a config that the arguments name, and of ``preset``, the
    value of ``--model``. tyro takes a twentieth of a second for a parser of all fields. With
    ``--help`` the class has all fields and their documentation."""
    import tyro  # a slow import that only command lines need

    help = f"a preset: {', '.join(PRESETS)}"
    preset = Annotated[str, tyro.conf.arg(name="model", metavar="NAME", help=help)]
    if {"--help", "-h"} & {*argv}:
        file = Annotated[str | None, tyro.conf.arg(metavar="FILE", help=_CONFIG_HELP)]
        prints = Annotated[bool, tyro.conf.arg(help=_PRINT_HELP), tyro.conf.FlagCreatePairsOff]
        return make_dataclass(
            "CommandLine",
            [
                ("preset", preset, field(default="tiny")),
                ("config", file, field(default=None)),
                ("print_config", prints, field(default=False)),
            ],
            bases=(config_class,),
            namespace={"__doc__": config_class.__doc__},
            frozen=True,
        )
    words = {re.split("[.=]", word.lstrip("-"))[0].replace("-", "_") for word in argv}
    words |= {word.removeprefix("no_") for word in words}
    hints = _hints(config_class)
    named = [(f.name, hints[f.name]) for f in fields(config_class) if f.name in words]
    return make_dataclass("CommandLine", [*named, ("preset", preset)], frozen=True)


@cache
def fields_of(config_class: type, prefix: str = "") -> dict[str, Any]:
    """Return the type of every field of a config class, by dotted name."""
    found: dict[str, Any] = {}
    hints = _hints(config_class)
    for f in fields(config_class):
        path, hint = f"{prefix}{f.name}", hints[f.name]
        inner: Any = hint
        found |= fields_of(inner, f"{path}.") if is_dataclass(hint) else {path: hint}
    return found


@cache
def _hints(config_class: type) -> dict[str, Any]:
    return typing.get_type_hints(config_class)


# Flag names of other trainers.
_ALIASES = {
    "lr": "--optim.lr",
    "learning-rate": "--optim.lr",
    "precision": "--dtype",
    "epochs": "--steps",
    "seq-length": "--data.seq-len",
    "hidden-size": "--model.embed",
    "num-layers": "--model.layers",
    **dict.fromkeys(("global-batch-size", "rampup-batch-size"), "--batch"),
    "micro-batch-size": "--micro-batch",
    "start-weight-decay": "--optim.weight-decay",
    "end-weight-decay": "--optim.final-weight-decay",
    "weight-decay-incr-style": "--optim.weight-decay-schedule",
    **dict.fromkeys(("tp", "dp", "pp", "gpus"), "--mesh"),
    "wandb-project": "--track-project",
    "wandb-exp-name": "--track-name",
    **dict.fromkeys(("wandb", "mlflow", "tensorboard-dir", "report-to"), "--track"),
    "log-straggler": "--watch-every",
    "check-weight-hash-across-dp-replicas-interval": "--check-replicas-every",
    "deterministic-mode": "--deterministic",
}


def nearest(flag: str, known: Sequence[str]) -> str | None:
    """Guess the intended flag, or return None. The candidates, the best first: an alias of other
    trainers, a flag with the same last component (also under its old name), a similar spelling."""
    name = flag.lstrip("-")
    for part in (name, name.rpartition(".")[2]):
        if _ALIASES.get(part) in known:
            return _ALIASES[part]
    ends = (name, last_component(name))
    same_end = [k for k in known if k.rpartition(".")[2] in ends]
    return next(iter(same_end or difflib.get_close_matches(flag, known, n=1, cutoff=0.6)), None)


def rule_of(hint: Any) -> str:
    """Say in words which values a field takes."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if hint in words:
        return words[hint]
    if hint is type(None):
        return "'None'"
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, typing.get_args(hint)))}"
    return " or ".join(map(rule_of, typing.get_args(hint)))
