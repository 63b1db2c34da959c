"""The commands of the pages: found in their text, and read by the program that they start."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from functools import cache
from inspect import signature
from io import StringIO
from textwrap import dedent
from unittest.mock import patch

from dtron.__main__ import COMMANDS, program
from dtron.data.__main__ import ShowRowsConfig
from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.runtime import check_memory, cli, flags
from dtron.runtime.config import RunConfig
from dtron.runtime.launch import plan_run
from dtron.tools.coordinate_check import CoordinateCheckConfig
from dtron.tools.plan import PlanConfig, SearchConfig
from dtron.tools.show import ShowConfig
from dtron.tools.verify import VerifyConfig
from tests.helpers.paths import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "tests/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^[ ]*```(\w*)\n(.*?)^[ ]*```", re.M | re.S)
INLINE = re.compile(r"`((?:python|torchrun|dtron|pip|pytest|ruff|mkdocs) [^`]*)`")
EXAMPLE = re.compile(r"\]\((tests/\w+/toy_\w+\.py)\)")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]*")
SHELLS = {"bash", "sh", "console"}
SHELL_ENDS = {"|", ">", ">>"}
# A comment line of a fence. It is about the commands below it.
NEEDS = re.compile(r"# needs (.+)")

CONFIGS = {
    "train": RunConfig,
    "plan": PlanConfig,
    "show": ShowConfig,
    "verify": VerifyConfig,
    "coordinate-check": CoordinateCheckConfig,
}
OTHERS = ("pip", "pytest", "ruff", "mkdocs")  # programs that are not the project's
EXTRA = re.compile(r"\[(\w+)\]")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@dataclass(frozen=True)
class Command:
    """A command of a page.

    ``text``: the command as it is on the page.
    ``program``: a name of ``dtron.__main__.COMMANDS``, a file (``bench/fp8.py``), or one of OTHERS.
    ``args``: its arguments. ``processes``: how many torchrun starts.
    ``needs``: what most readers lack, such as "a GPU"; None: it runs anywhere.
    ``script``: the text of a file that the page builds, in whose name dtron's commands run."""

    text: str
    program: str
    args: tuple[str, ...]
    processes: int = 1
    needs: str | None = None
    script: str = ""

    @property
    def runs(self) -> bool:
        """Whether it is a program of the project that runs on any machine."""
        return self.needs is None and self.program not in OTHERS


def commands(page: str) -> Iterator[Command]:
    """The commands of a page's shell fences, in order.

    ``python NAME.py COMMAND`` may start a file that the page builds. Such a file ends with dtron's
    own command line."""
    for section in re.split(r"^## ", page, flags=re.M):
        script = built_by(section)
        for language, code in FENCE.findall(section):
            needs = None
            for line in code.replace("\\\n", " ").splitlines() if language in SHELLS else ():
                line = line.strip().removeprefix("$ ")
                if marker := NEEDS.match(line):
                    needs = marker[1]
                for found in parsed(line, script):
                    yield replace(found, needs=needs)


def built_by(section: str) -> str:
    """The file that a section builds: its Python fences, put together. If the section links to the
    whole file of its example, the file is that one, and then the fence that starts dtron."""
    fences = python_fences(section)
    if example := EXAMPLE.search(section):
        whole = (ROOT / example[1]).read_text()
        fences = [whole, *(code for code in fences if "__main__" in code)]
    return "\n".join(fences)


def python_fences(text: str) -> list[str]:
    return [dedent(code) for language, code in FENCE.findall(text) if language == "python"]


def inline(page: str) -> Iterator[Command]:
    """The commands in the prose of a page, with values for the placeholders."""
    for text in INLINE.findall(FENCE.sub("", page)):
        yield from parsed(" ".join(text.split()))


def parsed(line: str, script: str = "") -> Iterator[Command]:
    """The commands of a line: those that ``&&`` joins, without pipes and redirections."""
    words = shlex.split(line, comments=True)
    while words:
        end = words.index("&&") if "&&" in words else len(words)
        part, words = words[:end], words[end + 1 :]
        stop = min((part.index(w) for w in SHELL_ENDS if w in part), default=len(part))
        yield _command(" ".join(part), part[:stop], script)


def _command(text: str, words: list[str], script: str) -> Command:
    processes = 1
    if words[0] == "torchrun":
        if words[1] != "--nproc-per-node":
            raise UserError(f"{text}: torchrun needs --nproc-per-node")
        processes, words = int(words[2]), ["python", *words[3:]]
    if words[0] in OTHERS:
        return Command(text, words[0], tuple(words[1:]))
    name, *args = words[1:]
    if name == "-m":
        name, *args = words[2].removeprefix("dtron."), *words[3:]
    if name == "train.py":
        name = "train"
    elif "__main__" in script and not (ROOT / name).exists() and name not in COMMANDS:
        return Command(text, args[0], tuple(args[1:]), processes, script=script)
    if name not in COMMANDS and not (ROOT / name).is_file():
        raise UserError(f"{text}: there is no program {name}")
    return Command(text, name, tuple(args), processes)


class _Reached(Exception):
    """A program has come to its arguments. The argument: its parser."""


def _stop(self: argparse.ArgumentParser, *args, **kwargs):
    raise _Reached(self)


@cache
def parser_of(name: str) -> argparse.ArgumentParser | None:
    """The parser with which a program reads its arguments; None for a program without any. The
    program is stopped before it does more."""
    main = main_of(name)
    with patch.object(argparse.ArgumentParser, "parse_args", _stop):
        try:
            main([]) if signature(main).parameters else main()
        except _Reached as reached:
            return reached.args[0]
    return None


def main_of(name: str) -> Callable:
    """The ``main`` of a program."""
    if name in COMMANDS:
        return program(name)
    path = ROOT / name
    sys.path.insert(0, str(path.parent))  # as Python does for a program
    spec = importlib.util.spec_from_file_location(f"page_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module.main


def check(command: Command) -> None:
    """Read the arguments as the program does. Raises UserError for what it would refuse: of the
    flags of any program, and of a run's mesh, model and batch."""
    if command.script:  # its flags may have values that the file adds
        if unknown := _names(command) - flags_of(command.program):
            raise UserError(f"{command.text}: unknown flag {', '.join(unknown)}")
    elif command.program in CONFIGS:
        args, kind = command.args, CONFIGS[command.program]
        if command.program == "plan" and list(args[:1]) == ["search"]:
            args, kind = args[1:], SearchConfig
        config = cli.parse(args, kind())
        if command.program == "train":
            # The command may be for a machine with more memory than this one.
            with patch.object(check_memory, "_host_memory", lambda: 1 << 60):
                plan_run(replace(config, simulate=True))
        if command.processes > 1:
            MeshShape.parse(config.mesh, command.processes)
    elif command.program == "data" and command.args[:1] == ("show",):
        cli.parse(command.args[1:], ShowRowsConfig())
    elif command.program == "pip":
        for extra in EXTRA.findall(command.text):
            if extra not in EXTRAS:
                raise UserError(f"{command.text}: there is no extra {extra}")
    elif command.program not in OTHERS:
        said = StringIO()
        try:
            with redirect_stderr(said):
                parser_of(command.program).parse_args(command.args)
        except SystemExit as stop:
            raise UserError(f"{command.text}: {said.getvalue().splitlines()[-1]}") from stop


def flags_of(name: str) -> set[str]:
    """The flags of a program."""
    if name in CONFIGS:
        return {"--model", *flags.OF_EVERY_COMMAND, *flags.flags_of(CONFIGS[name])}
    return set(_flags(parser_of(name)))


@cache
def all_flags() -> frozenset[str]:
    """The flags of all programs, and of those others that the pages name flags of."""
    bench = (
        f"bench/{p.name}" for p in (ROOT / "bench").glob("*.py") if "__main__" in p.read_text()
    )
    others = {"--hypothesis-profile", "--local-dir", "--max-restarts", "--nproc-per-node"}
    # Of torchrun and torchx.
    others |= {"--no-python", "--rdzv-endpoint", "--script", "--shutdown-timeout"}
    others |= {"--signals-to-handle"}
    others |= set(flags.flags_of(ShowRowsConfig))
    return frozenset(others.union(*(flags_of(name) for name in (*COMMANDS, *bench))))


def unknown_flags(page: str) -> list[str]:
    """The flags in the prose of a page that no program has, and those of a command in the prose
    that its program does not have. ``--model.rope.*`` stands for every flag that begins so."""
    text = FENCE.sub("", page)
    words = {
        word.rstrip(".") for code in re.findall(r"`([^`]+)`", text) for word in FLAG.findall(code)
    }
    found = [w for w in words if not any(f == w or f.startswith(f"{w}.") for f in all_flags())]
    for command in inline(page):
        if command.program not in OTHERS and command.args:
            found += _names(command) - flags_of(command.program)
    return sorted(found)


def _names(command: Command) -> set[str]:
    return {word.partition("=")[0] for word in command.args if word.startswith("--")}


def _flags(parser: argparse.ArgumentParser | None) -> Iterator[str]:
    for action in parser._actions if parser else ():
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _flags(inner)
