"""``python -m dtron.hf export RUN DIR``: exports a run as a Hugging Face folder, or its updates as
PEFT adapter files. ``python -m dtron.hf push RUN org/name`` exports a run and uploads the export to
the Hugging Face hub. In the place of a run it takes a folder that is exported already.

The run's newest checkpoint is exported.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from dtron.runtime.exit import before_imports

    before_imports()

import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dtron.errors import UserError
from dtron.hf.push import check_push, push
from dtron.runtime.exit import Parser, run_cli
from dtron.runtime.export_run import export_adapter, export_run
from dtron.runtime.run_directory import is_run

_UNITS = {"GB": 10**9, "MB": 10**6, "KB": 10**3, "": 1}


def size(text: str) -> int:
    number = text.rstrip("GMKB")
    value = float(number) * _UNITS[text[len(number) :]]
    if not 1 <= value < 1 << 62:
        raise ValueError
    return int(value)


def parser() -> Parser:
    made = Parser(prog="python -m dtron.hf", description="Export runs as Hugging Face checkpoints.")
    commands = made.add_subparsers(dest="command", required=True, parser_class=Parser)
    add = commands.add_parser(
        "export", help="write safetensors, config.json and tokenizer"
    ).add_argument
    add("run", metavar="RUN", help="a run directory with a checkpoint")
    add("out", metavar="DIR", help="the folder to write, which must be empty or not exist")
    _add_options(add)
    add = commands.add_parser(
        "push", help="export a run, and upload it to the Hugging Face hub"
    ).add_argument
    add("run", metavar="RUN", help="a run directory with a checkpoint, or the folder of an export")
    add("name", metavar="ORG/NAME", help="the repository on the hub; it is made if it is not there")
    add("--public", action="store_true", help="everyone may see it; a new one is private otherwise")
    add("--message", metavar="TEXT", help="message of the commit")
    _add_options(add)
    return made


def _add_options(add: Callable[..., Any]) -> None:
    """Add the flags that say how a run is exported."""
    add(
        "--dtype",
        choices=["bfloat16", "float32"],
        help="dtype of the weights (dtype of the model that the run began with)",
    )
    add(
        "--family",
        metavar="NAME",
        help="the model_type (the family of the model that the run began with, or the first family "
        "that can express the model)",
    )
    add(
        "--shard-size",
        type=size,
        default="5GB",
        metavar="N",
        help="maximum size of one file, as 500MB (5GB)",
    )
    add(
        "--adapter",
        action="store_true",
        help="write the updates of LoRA alone, as adapter files of PEFT; by default they are "
        "merged into the model",
    )
    add("--ema", action="store_true", help="export the average of the weights (--optim.ema)")


def run_export(o: Namespace) -> int:
    if o.adapter:
        if flag := "--dtype" if o.dtype else "--family" if o.family else "":
            raise UserError(f"--adapter {flag}: is for whole models; drop {flag}")
        count = export_adapter(Path(o.run), Path(o.out), o.ema)
        print(f"{o.out}: {count} tensors of updates")
        return 0
    dtype = None if o.dtype is None else getattr(torch, o.dtype)
    what = {"dtype": dtype, "family": o.family, "largest": o.shard_size, "average": o.ema}
    done = export_run(Path(o.run), Path(o.out), **what)
    files = f"{len(done.files)} file{'s' if len(done.files) > 1 else ''}"
    print(
        f"{o.out}: {done.family}, {done.tensors} tensors, {done.bytes / 1e9:.3f} GB in {files}, "
        f"of step {done.step}"
    )
    return 0


def run_push(o: Namespace) -> int:
    check_push(o.name)
    folder = Path(o.run)
    if is_run(folder):
        with tempfile.TemporaryDirectory(prefix="dtron-push-") as made:
            o.out = f"{made}/{o.name.rpartition('/')[2]}"
            run_export(o)
            url = push(Path(o.out), o.name, o.public, o.message or f"Export of {folder.name}")
    else:
        given = {"--dtype": o.dtype, "--family": o.family, "--adapter": o.adapter, "--ema": o.ema}
        if flag := next((flag for flag, value in given.items() if value), None):
            raise UserError(f"{flag}: is for a run, and {folder} is none; leave {flag} out")
        url = push(folder, o.name, o.public, o.message or "Upload with dtron")
    print(f"{o.name}: {url}")
    return 0


def main(argv: Sequence[str]) -> int:
    o = parser().parse_args(list(argv))
    return run_export(o) if o.command == "export" else run_push(o)


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
