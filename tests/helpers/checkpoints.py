"""Checkpoints: read without dtron, as docs/checkpoints.md shows, and compared as files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from dtron.checkpoint import files


def read_tensor(path: Path, name: str) -> torch.Tensor:
    entry = json.loads((path / "meta.json").read_text())["tensors"][name]
    whole = torch.empty(entry["shape"])
    for file, start, shape in entry["parts"]:
        with safe_open(path / file, "pt") as opened:
            index = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
            whole[index] = opened.get_tensor(name)
    return whole


def with_public_tools(path: Path) -> dict[str, torch.Tensor]:
    """The whole tensors of a checkpoint."""
    names = json.loads((path / "meta.json").read_text())["tensors"]
    return {name: read_tensor(path, name) for name in names}


def weights(run_dir: Path) -> dict[str, tuple[int, int]]:
    """Sizes and checksums of the files of a run's newest checkpoint."""
    listed = files.read_meta(files.newest(run_dir)).files
    return {name: (file.size, file.crc32) for name, file in listed.items()}
