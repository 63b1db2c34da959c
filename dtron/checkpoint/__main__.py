"""``python -m dtron.checkpoint inspect DIR``: lists checkpoints, or the weights of one.

Every file is read and its checksum compared. The exit code is 1 if a checkpoint is damaged.

``python -m dtron.checkpoint convert RUN --trust``: gives the checkpoints of an older version
today's format (convert.py).
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from dtron.runtime.exit import before_imports

    before_imports()

import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dtron.checkpoint import files
from dtron.checkpoint.meta import META, Meta
from dtron.checkpoint.storage import AnyPath, any_path, storage_of
from dtron.errors import UserError
from dtron.runtime.exit import Parser, run_cli


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m dtron.checkpoint", description="Inspect checkpoints.")
    parser.add_argument("command", choices=["inspect", "convert"])
    parser.add_argument(
        "dir", help="a run directory, one checkpoint in it, or the same in an object store"
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="convert: the checkpoints are your own; an older format is a pickle, which can run "
        "code",
    )
    o = parser.parse_args(argv)
    console = Console(highlight=False)
    if o.command == "convert":
        return _convert(Path(o.dir), o.trust, console)
    if o.trust:
        raise UserError("--trust: is for convert; leave it out")
    return _inspect(any_path(o.dir), console)


def _inspect(at: AnyPath, console: Console) -> int:
    if META in storage_of(at).sizes(at, [META]):
        return _one(at, console)
    found = files.whole(at)
    if not found:
        raise UserError(
            f"{at}: no checkpoint there; give a run directory, or one of its checkpoints/step-*"
        )
    table = Table(title=str(at))
    for name in ("checkpoint", "samples", "files", "MiB", "state"):
        table.add_column(name, justify="left" if name in ("checkpoint", "state") else "right")
    states = [_state(path) for path in found]
    for path, (meta, state) in zip(found, states, strict=True):
        sizes = [file.size for file in meta.files.values()] if meta else []
        samples = str(meta.samples) if meta else ""
        table.add_row(path.name, samples, str(len(sizes)), f"{sum(sizes) / 2**20:.1f}", state)
    console.print(table)
    return 0 if all(state == "whole" for _, state in states) else 1


def _state(path: AnyPath) -> tuple[Meta | None, str]:
    try:
        meta = files.read_meta(path)
    except ValueError as error:
        return None, str(error).partition(": ")[2]
    bad = files.damaged(path, meta)
    return meta, f"damaged: {', '.join(bad)}" if bad else "whole"


def _one(path: AnyPath, console: Console) -> int:
    """Print the weights of one checkpoint."""
    meta, state = _state(path)
    if meta is None:
        raise UserError(f"{path}: {state}")
    table = Table(title=f"{path.name}: step {meta.step}, {meta.samples} samples, {state}")
    for name in ("weight", "shape", "dtype", "parts"):
        table.add_column(name)
    total, state_names = 0, []
    for name, tensor in sorted(meta.tensors.items()):
        kind, _, weight = name.partition(".")
        if kind != "params":
            state_names += [kind] * (kind not in state_names)
        else:
            total += math.prod(tensor.shape)
            shape = "x".join(map(str, tensor.shape))
            table.add_row(weight, shape, tensor.dtype, str(len(tensor.parts)))
    console.print(table)
    console.print(f"{total:,} parameters; optimizer state: {', '.join(state_names) or 'none'}")
    for name, value in meta.identity.items():
        console.print(f"  {name} = {value}", markup=False)
    return 0 if state == "whole" else 1


def _convert(run_dir: Path, trust: bool, console: Console) -> int:
    from dtron.checkpoint.convert import convert, old_checkpoints

    old = old_checkpoints(run_dir)
    if not old:
        raise UserError(f"{run_dir}: no checkpoint of an older format there; nothing to convert")
    if not trust:
        raise UserError(
            f"{run_dir}: {len(old)} checkpoints have an older format, whose .metadata is a pickle "
            "and can run any code when it is read; if they are your own, add --trust"
        )
    for path in old:
        convert(path)
        console.print(f"converted {path}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
