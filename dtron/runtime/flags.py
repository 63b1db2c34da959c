"""The flags of a config, and the dataclass from which tyro makes a parser of them."""

from __future__ import annotations

import re
import typing
from collections.abc import Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass
from functools import cache
from typing import Annotated, Any

from dtron.model.presets import PRESETS


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
        return make_dataclass(
            "CommandLine",
            [("preset", preset, field(default="tiny"))],
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
def _hints(config_class: type) -> dict[str, Any]:
    return typing.get_type_hints(config_class)
