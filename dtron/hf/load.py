"""Weights from a Hugging Face folder. Each rank reads only its own shard.

A rank takes four steps for each weight. The layout gives the rank's range of each dim. The family's
row maps these ranges to a box of the Hugging Face tensor. The reader reads the bytes of this box.
The rank casts them and has its shard. No rank ever holds more than its shard and one box in flight,
whatever the mesh, the ZeRO stage or the pipeline stage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtron.checkpoint.shard_range import lay, shard_range
from dtron.distributed.simulated_ranks import paused
from dtron.errors import UserError
from dtron.hf.config import read_config
from dtron.hf.families import Family, Row
from dtron.hf.safetensors import Reader
from dtron.hf.tensor_pattern import Range, halves, pattern
from dtron.mesh import Layout
from dtron.model.config import ModelConfig
from dtron.model.transformer import declare_model
from dtron.params import WeightSpec, flat, tree_map


@dataclass(frozen=True)
class Place:
    """The place of one dtron weight in a checkpoint. ``row``: the family's row with the block's
    number filled in. ``sizes``: the sizes of the axes in its pattern."""

    row: Row
    sizes: dict[str, int]

    @property
    def outside(self) -> tuple[str, ...]:
        return pattern(self.row.lies).outside

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of each of the Hugging Face tensors."""
        return pattern(self.row.lies).shape(self.sizes)

    def names(self, experts: Range | None = None) -> list[str]:
        """Return the names of the Hugging Face tensors: one name, or one for each expert (of this
        range)."""
        if not self.outside:
            return [self.row.name]
        return [
            self.row.name.replace("{e}", str(e)) for e in range(*(experts or (0, self.sizes["e"])))
        ]


def place(w: WeightSpec, family: Family, m: ModelConfig) -> Place:
    """Return the place of a weight. Raises UserError if the family has no such weight."""
    block = re.match(r"(\w+)\.(\d+)\.", w.path)
    row = family.weights.get(re.sub(r"\.\d+\.", ".{l}.", w.path, count=1))
    if row is None:
        raise UserError(
            f"{w.path}: a {family.kind} has no such weight; choose another family or model"
        )
    if block:
        number = int(block[2]) + (m.layers if block[1] == "mtp" else 0)
        row = row._replace(name=row.name.replace("{l}", str(number)))
    sizes = dict(zip(pattern(row.lies).ours, w.shape, strict=True))
    return Place(row, sizes | ({"v": m.vocab} if "v" in sizes else {}))


class Source:
    """A folder with a model in it, opened and checked. No weights have been read yet."""

    def __init__(self, folder: str | Path, m: ModelConfig | None = None):
        """``m``: the model that is wanted (None: the folder's own). Raises UserError unless the
        folder has all weights of the model and no others, each of its shape."""
        self.folder = Path(folder)
        self.family, self.model = read_config(self.folder)
        self.model = m or self.model
        self.reader = Reader(self.folder)
        self._check()
        self._last: tuple[Any, Tensor] | None = None

    @property
    def bytes_read(self) -> int:
        return self.reader.bytes_read

    def _check(self) -> None:
        have, wanted = dict(self.reader.entries), {}
        if not any(name.startswith(self.family.prefix) for name in have):
            # GPT-2 also exists without its prefix, saved from the bare model.
            plain = {
                self.family.prefix + name: e for name, e in have.items() if name != "lm_head.weight"
            }
            have = plain | {n: e for n, e in have.items() if n == "lm_head.weight"}
            self.reader.entries = have
        for w in flat(declare_model(self.model)):
            where = place(w, self.family, self.model)
            wanted |= dict.fromkeys(where.names(), where.shape)
        lost = [name for name in wanted if name not in have]
        if lost:
            raise UserError(f"{self.folder}: lacks {_some(lost)}; download it again")
        skipped = [*self.family.ignored, *([r"lm_head\.weight"] if self.model.tied else [])]
        extra = [n for n in have if n not in wanted and not any(self._skips(p, n) for p in skipped)]
        if extra:
            kind = self.family.kind
            raise UserError(
                f"{self.folder}: has {_some(extra)}, which dtron's {kind} does not know; give a plain one"
            )
        for name, shape in wanted.items():
            e = have[name]
            if e.shape != shape:
                raise UserError(
                    f"{e.file}: {name} is {list(e.shape)}, and by config.json must be {list(shape)}; "
                    "they are not of one model, download both again"
                )

    def _skips(self, text: str, name: str) -> bool:
        found = re.fullmatch(text.replace("{later}", r"(?P<later>\d+)"), name)
        return (
            bool(found)
            and int(found.groupdict().get("later", self.model.layers)) >= self.model.layers
        )

    def load(
        self, spec: Any, layout: Layout, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> Any:
        """Return a tree of weights like ``spec``, the declared tree, in ``dtype``, with the
        layout's placements."""
        with torch.no_grad():
            return tree_map(lambda w: self._weight(w, layout, dtype, device), spec)

    def _weight(self, w: WeightSpec, layout: Layout, dtype: torch.dtype, device: str) -> Tensor:
        box = shard_range(w, layout, device)
        with paused():  # simulated ranks share the weights that are read
            where = place(w, self.family, self.model)
            x = self._part(where, box or [(0, n) for n in w.shape], dtype).to(device)
        return lay(x, w, layout, box)

    def _part(self, where: Place, box: list[Range], dtype: torch.dtype) -> Tensor:
        """Return these ranges of dtron's dims, read from the file."""
        p = pattern(where.row.lies)
        ranges = {
            axis: (min(a, where.sizes[axis]), min(b, where.sizes[axis]))
            for axis, (a, b) in zip(p.ours, box)
        }
        experts = ranges[where.outside[0]] if where.outside else None
        out = torch.zeros(
            [b - a for a, b in box], dtype=dtype
        )  # rows of the padded vocabulary are zero
        real = out[tuple(slice(ranges[axis][1] - ranges[axis][0]) for axis in p.ours)]
        for part, name in zip(real if experts else [real], where.names(experts), strict=True):
            x = p.take(self._read(name, p.box(ranges, where.sizes)), ranges, where.sizes)
            part.copy_(halves(x, rotary_columns(self.model)) if where.row.paired else x)
        return out

    def _read(self, name: str, box: list[Range]) -> Tensor:
        """Read a box of a tensor. The last result is kept, because two dtron weights may be two
        halves of one Hugging Face tensor."""
        if self._last is None or self._last[0] != (name, box):
            self._last = None
            self._last = (name, box), self.reader.read(name, box)
        return self._last[1]

    def close(self) -> None:
        self._last = None
        self.reader.close()


def rotary_columns(m: ModelConfig) -> int:
    return m.mla.rope_dim if m.latent else m.head_dim


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def weights_of(m: ModelConfig, family: Family) -> Iterator[tuple[WeightSpec, Place]]:
    """Yield every weight of the model, and its place in the family's checkpoints."""
    for w in flat(declare_model(m)):
        yield w, place(w, family, m)
