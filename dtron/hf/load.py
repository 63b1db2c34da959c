"""Weights from a Hugging Face folder. Each rank reads only its own shard.

A rank takes four steps for each weight:

1. The layout gives the rank's range of each dim.
2. The family's row maps these ranges to a box (one range per dim) of the Hugging Face tensor.
3. The reader reads the bytes of this box.
4. The rank casts the bytes to the dtype of its shard.

No rank ever holds more than its shards and one box in flight, whatever the mesh, the ZeRO stage or
the pipeline stage.

A model with more words than the folder gets new rows in embedding and head, each the mean of the
old rows (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtron.checkpoint.shard_range import Range, place_shard, shard_range
from dtron.data.cache import digest
from dtron.distributed.simulated_ranks import paused
from dtron.errors import UserError
from dtron.hf.config import CONFIG, read_config, text_entries
from dtron.hf.family import Family
from dtron.hf.open_folder import HEAD, open_reader, row_chunks, tensor_table, with_own_head
from dtron.hf.recurrent_tables import axis_sizes
from dtron.hf.tensor_pattern import halves, pattern
from dtron.hf.weight_files import some
from dtron.hf.weight_tables import Row
from dtron.json_files import read_object
from dtron.mesh import Layout
from dtron.model.config import ModelConfig
from dtron.model.transformer import declare_model
from dtron.params import WeightSpec
from dtron.tree import flat, tree_map


@dataclass(frozen=True)
class Place:
    """The place of one dtron weight in a checkpoint.

    ``row``: the family's row with the block's number filled in.
    ``sizes``: the sizes of the axes in the row's pattern."""

    row: Row
    sizes: dict[str, int]

    @property
    def outside(self) -> tuple[str, ...]:
        """The axes that are in the names of the Hugging Face tensors: no axis, or the experts."""
        return pattern(self.row.pattern).outside

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of each of the Hugging Face tensors."""
        return pattern(self.row.pattern).shape(self.sizes)

    def names(self, experts: Range | None = None) -> list[str]:
        """Return the names of the Hugging Face tensors: one name, or one for each expert of the
        range ``experts`` (None: all experts)."""
        if not self.outside:
            return [self.row.name]
        start, stop = experts or (0, self.sizes["e"])
        return [self.row.name.replace("{e}", str(e)) for e in range(start, stop)]


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
    # Of other weights in the same tensor, and of axes that share a dim with another axis.
    sizes = {"n": m.heads, "k": m.kv_heads, **axis_sizes(m)}
    sizes |= pattern(row.pattern).sizes(w.shape, sizes)
    return Place(row, sizes | ({"v": m.vocab} if "v" in sizes else {}))


class Source:
    """A folder with a model in it, opened and checked. No weights have been read yet.

    ``notes``: lines about weights that the folder does not have as the model needs them."""

    def __init__(self, folder: str | Path, m: ModelConfig | None = None):
        """Open the folder and check that it has all weights of the model, no others, and each in
        its shape. Raises UserError otherwise.

        ``m``: the model (None: the model of the folder)."""
        self.folder = Path(folder)
        self.family, said = read_config(self.folder)
        self.reader = open_reader(self.folder, self.family)
        self.model = m or with_own_head(said, self.family, self.reader)
        self.family = replace(
            self.family, weights=tensor_table(self.family, self.model, self.reader)
        )
        self._stored = replace(self.model, vocab=said.vocab)
        self.notes = self._notes(said)
        self._check()
        self._last: tuple[Any, Tensor] | None = None

    @property
    def bytes_read(self) -> int:
        return self.reader.bytes_read

    def digest(self) -> str:
        """Return a digest of config.json and of the names, shapes and places of all tensors. The
        bytes of the tensors are not read."""
        parts = [(self.folder / CONFIG).read_bytes()]
        for name, e in sorted(self.reader.entries.items()):
            place = name, e.file.name, e.dtype, e.shape, e.start, e.stop
            parts.append(repr(place).encode())
        return digest(parts)

    def _notes(self, said: ModelConfig) -> tuple[str, ...]:
        """Return the notes. ``said``: the model of config.json."""
        out = []
        if said.tied and not self.model.tied:
            out.append(
                f"{self.folder}: tie_word_embeddings is true, and {HEAD} is not the embedding; the "
                "model has a head of its own"
            )
        new = self.model.vocab - self._stored.vocab
        if new:
            out.append(
                f"{self.folder}: the vocabulary grows by {new}, from {self._stored.vocab} to "
                f"{self.model.vocab}; each new row is the mean of the old rows"
            )
        return tuple(out)

    def _check(self) -> None:
        have = self.reader.entries
        wanted: dict[str, tuple[int, ...]] = {}
        for w in flat(declare_model(self.model)):
            where = place(w, self.family, self._stored)
            wanted |= dict.fromkeys(where.names(), where.shape)
        lost = [name for name in wanted if name not in have]
        skipped = [*self.family.ignored, *([re.escape(HEAD)] if self.model.tied else [])]
        extra = [n for n in have if n not in wanted and not any(self._skips(p, n) for p in skipped)]
        files = len({entry.file for entry in have.values()})
        if lost:
            rest = (
                f"; {some(extra)} {'is' if len(extra) == 1 else 'are'} of no use" if extra else ""
            )
            raise UserError(
                f"{self.folder}: lacks {some(lost)}: it has {len(wanted) - len(lost)} of the "
                f"{len(wanted)} tensors of this {self.family.kind} in {files} "
                f"{'file' if files == 1 else 'files'}{rest}"
            )
        if extra:
            raise UserError(
                f"{self.folder}: has {some(extra)}, which {self.family.kind} does not have by "
                "config.json; remove the tensors, or correct config.json"
            )
        for name, shape in wanted.items():
            e = have[name]
            if e.shape != shape:
                raise UserError(
                    f"{e.file}: {name} is {list(e.shape)}, and by config.json must be "
                    f"{list(shape)}; they are not of one model{self._left_out()}"
                )

    def _left_out(self) -> str:
        """Return the sizes that config.json does not give, for an error."""
        entries = text_entries(read_object(self.folder / CONFIG))
        keys = [theirs.split("|") for theirs in self.family.keys.values()]
        lacking = [names[0] for names in keys if not any(name in entries for name in names)]
        said = [f"{name} ({self.family.defaults[name]} then)" for name in lacking]
        return f"; config.json lacks {some(said)}" if said else ""

    def _skips(self, text: str, name: str) -> bool:
        """Whether the pattern ``text`` of ``Family.ignored`` matches this tensor's name."""
        match = re.fullmatch(text.replace("{later}", r"(?P<later>\d+)"), name)
        if match is None:
            return False
        return int(match.groupdict().get("later", self.model.layers)) >= self.model.layers

    def load(
        self, spec: Any, layout: Layout, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> Any:
        """Load the weights with the layout's placements.

        ``spec``: the declared tree; the result is a tree like it.
        ``dtype``: dtype of the weights."""
        with torch.no_grad():
            read = partial(self.weight, layout=layout, dtype=dtype, device=device)
            return tree_map(read, spec)

    def weight(self, w: WeightSpec, layout: Layout, dtype: torch.dtype, device: str) -> Tensor:
        """Load one weight. Not differentiable."""
        shard = shard_range(w, layout, device)
        with paused():  # simulated ranks share the weights that are read
            where = place(w, self.family, self._stored)
            x = self._part(where, shard or [(0, n) for n in w.shape], dtype).to(device)
        return place_shard(x, w, layout, shard)

    def _part(self, where: Place, shard: list[Range], dtype: torch.dtype) -> Tensor:
        """Read the shard with these ranges of dtron's dims. New words have the mean row, and rows
        of the padded vocabulary are zero."""
        p = pattern(where.row.pattern)
        ranges = p.ranges(shard, where.sizes)
        experts = ranges[where.outside[0]] if where.outside else None
        out = torch.zeros([b - a for a, b in shard], dtype=dtype)
        last = (ranges[dim[0]][1] - ranges[dim[0]][0] for dim in p.dims)
        real = out[
            tuple(slice(n) if len(dim) == 1 else slice(None) for n, dim in zip(last, p.dims))
        ]
        for part, name in zip(real if experts else [real], where.names(experts), strict=True):
            x = p.take(self._read(name, p.box(ranges, where.sizes)), ranges, where.sizes)
            x = halves(x, rotary_columns(self.model)) if where.row.paired else x
            part.copy_(x.flip(0) if where.row.flipped else x)
            if where.row.offset:
                part += where.row.offset
        if "v" in p.ours:
            dim = p.ours.index("v")
            first, stop = shard[dim]
            new = max(first, self._stored.vocab), min(stop, self.model.vocab)
            if new[0] < new[1]:
                row = self._mean_row(where, ranges).to(dtype)
                out.narrow(dim, new[0] - first, new[1] - new[0]).copy_(row.unsqueeze(dim))
        return out

    def _mean_row(self, where: Place, ranges: dict[str, Range]) -> Tensor:
        """Return the mean over the folder's vocabulary, in these ranges of the other axes."""
        p, words = pattern(where.row.pattern), where.sizes["v"]
        columns = math.prod(b - a for axis, (a, b) in ranges.items() if axis != "v")
        total = torch.zeros((), dtype=torch.float64)
        for rows in row_chunks(words, columns):
            some_rows = {**ranges, "v": rows}
            x = self.reader.read(where.row.name, p.box(some_rows, where.sizes))
            total = total + p.take(x, some_rows, where.sizes).double().sum(p.ours.index("v"))
        return total / words

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


def weights_of(m: ModelConfig, family: Family) -> Iterator[tuple[WeightSpec, Place]]:
    """Yield every weight of the model, and its place in the family's checkpoints."""
    for w in flat(declare_model(m)):
        yield w, place(w, family, m)
