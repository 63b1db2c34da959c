"""``dtron COMMAND ...`` and ``python -m dtron COMMAND ...`` start every program of dtron.

``dtron train`` is train.py, ``dtron verify`` is ``python -m dtron.verify``, and so on.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from dtron.errors import UserError
from dtron.runtime.exit import before_imports, run_cli
from dtron.runtime.signals import allow_interrupts, stop_at_once

COMMANDS = {
    "train": ("", "train a model; the same as train.py"),
    "verify": ("dtron.tools.verify", "prove that a step on a mesh has the result of one device"),
    "plan": ("dtron.tools.plan", "plan memory and time of a step on any mesh, without a GPU"),
    "show": ("dtron.tools.show", "show every weight on a mesh, and its memory"),
    "report": ("dtron.tools.report", "draw the curves of runs as one page of HTML"),
    "watch": ("dtron.tools.watch", "follow a run in the terminal"),
    "coordinate-check": (
        "dtron.tools.coordinate_check",
        "check that activations do not grow with the width (muP)",
    ),
    "generate": ("dtron.tools.generate", "generate text"),
    "eval": ("dtron.tools.evaluate", "evaluate a model on tasks, or by its perplexity on a text"),
    "profile": ("dtron.tools.profile", "print the time breakdown of a recorded step"),
    "data": ("dtron.data.__main__", "make and describe token files"),
    "hf": ("dtron.hf.__main__", "export a run as a Hugging Face folder, or push it to the hub"),
    "checkpoint": ("dtron.checkpoint.__main__", "inspect the checkpoints of a run"),
    "schedules": ("dtron.schedules.__main__", "time pipeline schedules and draw them"),
    "fp8": ("dtron.fp8.__main__", "measure the rounding errors of each FP8 recipe"),
    "course": ("dtron.course.__main__", "start, check and grade the labs of docs/course"),
}


def usage() -> str:
    rows = "\n".join(f"  {name:<18}{what}" for name, (_, what) in COMMANDS.items())
    return (
        f"usage: dtron COMMAND [arguments]\n\n{rows}\n\ndtron COMMAND --help lists the arguments."
    )


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(COMMANDS)}"
        raise UserError(f"dtron {name}: unknown command; {hint}")
    stop_at_once()  # during the imports
    command = program(name)
    allow_interrupts()
    return command(rest)


def program(name: str) -> Callable[[list[str]], int]:
    """Return the ``main`` of a command. A wheel has train.py inside the package, and a checkout has
    train.py beside the package. The package comes first: in a folder of installed packages, a
    train.py beside this one belongs to another project."""
    if name != "train":
        return importlib.import_module(COMMANDS[name][0]).main
    package = Path(__file__).resolve().parent
    path = next(
        p for p in (package / "train_program.py", package.parent / "train.py") if p.is_file()
    )
    spec = importlib.util.spec_from_file_location("dtron_train", path)
    assert spec is not None and spec.loader is not None  # ``path`` is a Python file
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def run() -> None:
    """Run the console command."""
    before_imports()
    sys.exit(run_cli(main, sys.argv[1:]))


if __name__ == "__main__":
    run()
