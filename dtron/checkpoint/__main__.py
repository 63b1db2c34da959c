"""``python -m dtron.checkpoint inspect DIR``: lists checkpoints, or the weights of one.

Every file is read and its checksum compared. The exit code is 1 if a checkpoint is damaged.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dtron.checkpoint import files
from dtron.errors import UserError
from dtron.runtime.exit import Parser, run_cli


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m dtron.checkpoint", description="Inspect checkpoints.")
    parser.add_argument("command", choices=["inspect"])
    parser.add_argument("dir", type=Path, help="a run directory, or one checkpoint in it")
    o = parser.parse_args(argv)
    console = Console(highlight=False)
    if (o.dir / "meta.json").exists():
        return _one(o.dir, console)
    found = files.whole(o.dir)
    if not found:
        raise UserError(
            f"{o.dir}: no checkpoint there; give a run directory, or one of its checkpoints/step-*"
        )
    table = Table(title=str(o.dir))
    for name in ("checkpoint", "samples", "files", "MiB", "state"):
        table.add_column(name, justify="left" if name in ("checkpoint", "state") else "right")
    states = [_state(path) for path in found]
    for path, (meta, state) in zip(found, states, strict=True):
        listed = meta.get("files", {})
        size = sum(size for size, _ in listed.values()) / 2**20
        table.add_row(
            path.name, str(meta.get("samples", "")), str(len(listed)), f"{size:.1f}", state
        )
    console.print(table)
    return 0 if all(state == "whole" for _, state in states) else 1


def _state(path: Path) -> tuple[dict, str]:
    try:
        meta = files.read_meta(path)
    except ValueError as error:
        return {}, str(error).partition(": ")[2]
    bad = files.damaged(path, meta)
    return meta, f"damaged: {', '.join(bad)}" if bad else "whole"


def _one(path: Path, console: Console) -> int:
    """Print the weights of one checkpoint, as torch.distributed.checkpoint lists them."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    meta, state = _state(path)
    if not meta:
        raise UserError(f"{path}: {state}")
    table = Table(title=f"{path.name}: step {meta['step']}, {meta['samples']} samples, {state}")
    for name in ("weight", "shape", "dtype", "parts"):
        table.add_column(name)
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    total, state_names = 0, []
    for name, entry in sorted(entries.items()):
        kind, _, weight = name.partition(".")
        if kind != "params":
            state_names += [kind] * (kind not in state_names)
        else:
            assert isinstance(entry, TensorStorageMetadata)
            total += math.prod(entry.size)
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            table.add_row(weight, "x".join(map(str, entry.size)), dtype, str(len(entry.chunks)))
    console.print(table)
    console.print(f"{total:,} parameters; optimizer state: {', '.join(state_names) or 'none'}")
    for name, value in meta["identity"].items():
        console.print(f"  {name} = {value}", markup=False)
    return 0 if state == "whole" else 1


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
