"""``--config FILE``: the flags of a command in a file of TOML, YAML or JSON.

A key is the name of a flag, and the dots of a flag are tables: ``lr`` in ``[optim]`` is
``--optim.lr``. So a file is read as flags that stand before the flags of the command line, and the
later flag counts. The keys and the types are checked here, because a message has to name the file
and the key.

``model`` is the name of a preset, or a table with the fields of the model. In the table, ``preset``
is the name of the preset that the other fields override. ``--model NAME`` on the command line
replaces the whole model of the file.

YAML is read as version 1.2: ``off`` is text, and ``3e-4`` is a number. Anchors, aliases and tags
are refused, so a small file cannot become large.
"""

from __future__ import annotations

import math
import re
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from dtron.errors import UserError
from dtron.json_files import decode, read_bytes
from dtron.renamed import current, current_tree, dotted
from dtron.runtime.config import RunConfig
from dtron.runtime.flags import fields_of, nearest, rule_of

_LIMIT = 1 << 20  # bytes
_FLAG = re.compile(r"--([a-z][\w.-]*)|\b([a-z]\w*(?:\.\w+)+)=")


@dataclass(frozen=True)
class ConfigFile:
    """A file's flags, as the words of a command line.

    ``own``: the names of the flags on the command line itself.
    ``left_out``: sections, as ``[data]``, and keys that are flags of train.py, but not of the
        command. A key with its default value changes nothing, and is in no list."""

    path: str
    words: tuple[str, ...]
    own: frozenset[str]
    left_out: tuple[str, ...] = ()

    def note(self, command: str) -> str:
        """Return a line about what is left out; nothing if all of the file is taken."""
        text = f"{self.path}: {command} has no flags for {', '.join(self.left_out)}; left out"
        return text if self.left_out else ""

    def explain(self, error: UserError) -> UserError:
        """Return an error with the name of this file, unless its flag is on the command line."""
        found = _FLAG.search(str(error))
        name = (found[1] or found[2]).replace("_", "-") if found else ""
        return error if name in self.own else UserError(f"{self.path}: {error}")


def take_file(argv: Sequence[str], config_class: Any) -> tuple[list[str], ConfigFile | None]:
    """Return the arguments without ``--config FILE``, and the file. Raises UserError for a file
    that cannot be read, and for the first key that is no flag or has a value of another type.

    ``config_class``: the config of the command. A key that is a flag of train.py but not of this
        command, or has a value that only train.py takes, is checked and left out. So one file
        serves all commands."""
    rest, path = list[str](), None
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag != "--config":
            rest.append(word)
            continue
        if path is not None:
            raise UserError(f"--config {path}: is given twice; give one file")
        path = value if equals else next(words, "")
        if not path or path.startswith("--"):
            raise UserError("--config: needs a file, as in --config run.toml; see --help")
    if path is None:
        return rest, None
    own = frozenset(w[2:].partition("=")[0].replace("_", "-") for w in rest if w.startswith("--"))
    values = _read(Path(path))
    flags = list(_flags(path, values, config_class))
    taken = {name: word for name, word in flags if word is not None}
    kept = [w for name, w in taken.items() if "model" not in own or _section(name) != "model"]
    sections = {_section(name) for name in taken}
    others = [name for name, word in flags if word is None]
    left = [f"[{s}]" if (s := _section(name)) and s not in sections else name for name in others]
    return rest, ConfigFile(path, tuple(kept), own, tuple(dict.fromkeys(left)))


def _section(name: str) -> str:
    return name.partition(".")[0] if "." in name else ""


def _read(path: Path) -> Mapping[str, Any]:
    """Return the tables of a file."""
    kinds: dict[str, Callable[[str], Any]] = {
        ".toml": tomllib.loads,
        ".yaml": _yaml,
        ".yml": _yaml,
        ".json": _json,
    }
    if path.suffix not in kinds:
        raise UserError(f"--config {path}: must end in {', '.join(kinds)}; rename it")
    content = read_bytes(path, _LIMIT)
    try:
        values = kinds[path.suffix](content.decode())
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: is not UTF-8 (byte {error.start} is {content[error.start]:#04x}); save it as "
            "UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: cannot be read as {path.suffix[1:].upper()} ({said}); mend it"
        ) from error
    if not isinstance(values, Mapping):
        raise UserError(f"{path}: must have keys with values, as steps; it has {values!r:.40}")
    return values


def _json(text: str) -> dict[str, Any]:
    """Read JSON, as the config.json of a run of this version or an older one."""
    return current_tree(decode(text.encode(), dict[str, Any], "the text"))


def _yaml(text: str) -> Any:
    """Read YAML 1.2 without anchors, aliases and tags. Raises ValueError."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, Any] = {}

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if event.anchor is not None or getattr(event, "tag", None) is not None:
                where = f"line {event.start_mark.line + 1}"
                raise ValueError(f"{where}: anchors, aliases and tags are not allowed")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value]
            for key, _ in node.value:
                if key.tag.endswith((":map", ":seq")) or names.count(key.value) > 1:
                    line = key.start_mark.line + 1
                    raise ValueError(f"line {line}: a key must be a name, and each name once")
            return super().construct_mapping(node, deep)

    kinds = {
        "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
        "int": (r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
        "float": (
            r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?[0-9]+[eE][-+]?[0-9]+"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
            "-+.0123456789",
        ),
        "null": (r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    }
    for name, (pattern, first) in kinds.items():
        expression = re.compile(f"(?:{pattern})$")
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", expression, list(first))
    try:
        values = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    return {} if values is None else values


def _flags(
    path: str, values: Mapping[str, Any], config_class: Any
) -> Iterator[tuple[str, str | None]]:
    """Yield the name of each flag, and the flag with its value as a word of a command line. The
    word is None for a key that the command leaves out and that changes a run."""
    usual, of_train = dotted(asdict(RunConfig())), fields_of(RunConfig)
    taken = {**fields_of(config_class), "model.preset": str}
    known, seen = {**of_train, **taken}, set[str]()
    groups = {name.rpartition(".")[0] for name in known}
    groups |= {name.rpartition(".")[0] for name in groups}
    for written, value in _leaves(values):
        name = written.replace("-", "_")
        if name in seen:
            raise UserError(f"{path}: {written}: is given twice; leave one out")
        seen.add(name)
        if name == "model" and isinstance(value, str):
            name = "model.preset"
        if name in groups and isinstance(value, Mapping):
            continue  # an empty table
        if name in groups:
            inner = next(key for key in known if key.startswith(f"{name}."))
            raise UserError(
                f"{path}: {written} is {value!r:.40}: must be a table of keys, as {inner}"
            )
        if name not in known:
            raise _unknown(path, written, known)
        hints = [hint for kinds in (taken, of_train) if (hint := kinds.get(name)) is not None]
        hint = next((hint for hint in hints if _fits(value, hint)), hints[0])
        word = _word(path, written, name, value, hint)
        if hint is taken.get(name):
            yield name.replace("_", "-"), word
        elif _section(name) or value != ("None" if usual[name] is None else usual[name]):
            yield name, None


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _unknown(path: str, written: str, known: Mapping[str, Any]) -> UserError:
    name = written.replace("-", "_")
    parts = name.split(".")
    for i in range(1, len(parts)):
        if (group := ".".join(parts[:i])) in known:
            rule = rule_of(known[group])
            return UserError(f"{path}: {group}: must be {rule}, and no table; give one value")
    new = ", ".join(current({name: None}))
    if new != name:
        return UserError(f"{path}: {written}: was replaced; use {new}")
    flags = {"--" + key.replace("_", "-"): key for key in known}
    near = nearest("--" + name.replace("_", "-").lower(), list(flags))
    hint = f"did you mean {flags[near]}?" if near else "--help lists the flags, which are the keys"
    return UserError(f"{path}: {written:.80}: unknown key; {hint}")


def _word(path: str, written: str, name: str, value: Any, hint: Any) -> str:
    """Return a flag with its value. Raises UserError for a value of another type."""
    try:
        value = msgspec.convert(_nothing(value, hint), hint)
    except msgspec.ValidationError as error:
        raise UserError(
            f"{path}: {written} is {value!r:.60}: must be {rule_of(hint)}; change it"
        ) from error
    group, dot, last = name.replace("_", "-").rpartition(".")
    if name == "model.preset":
        return f"--model={value}"
    if hint is bool:
        return f"--{group}{dot}{'' if value else 'no-'}{last}"
    return f"--{group}{dot}{last}={value}"


def _fits(value: Any, hint: Any) -> bool:
    try:
        msgspec.convert(_nothing(value, hint), hint)
    except msgspec.ValidationError:
        return False
    return True


def _nothing(value: Any, hint: Any) -> Any:
    """Return None for the text that stands for it."""
    return None if value == "None" and type(None) in typing.get_args(hint) else value


def toml_text(values: Mapping[str, Any]) -> str:
    """Return nested values as TOML, which ``--config`` reads. TOML has no null: None is the text
    "None", as on a command line."""
    return "\n".join(_table(values, "")).lstrip("\n") + "\n"


def _table(values: Mapping[str, Any], name: str) -> Iterator[str]:
    inner = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    if len(inner) < len(values):
        yield from ("", f"[{name}]") if name else ()
    for key, value in values.items():
        if key not in inner:
            yield f"{key} = {_value(value)}"
    for key, table in inner.items():
        yield from _table(table, f"{name}.{key}" if name else key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: "inf", -math.inf: "-inf"}.get(value, "nan")
    if isinstance(value, int | float):
        return repr(value)
    escaped = re.sub(r'[\x00-\x1f\x7f"\\]', lambda c: f"\\u{ord(c[0]):04x}", str(value))
    return f'"{escaped}"'
