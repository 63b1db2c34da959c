"""A Hugging Face folder, opened: its model, its tensors, and the names of the tensors.

A folder means what transformers takes it to mean, whatever program saved it:

- ``tie_word_embeddings`` is true, and the folder has a head with other values: the model has a head
  of its own. (transformers from version 5; older versions took the embedding.)
- The head is tied, and the folder has the head but no embedding: the embedding is the head.
- All experts are in one tensor, or each expert is in tensors of its own.
- The names of a GPT-2 have no prefix, because it was saved without a head.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from dtron.checkpoint.shard_range import Range
from dtron.hf.config import CONFIG, read_config
from dtron.hf.dequantize import Dequantizer
from dtron.hf.family import Family
from dtron.hf.weight_files import Reader
from dtron.hf.weight_tables import Row
from dtron.json_files import read_object
from dtron.model.config import ModelConfig

HEAD = "lm_head.weight"


def open_reader(folder: Path, family: Family) -> Reader | Dequantizer:
    """Open the tensors of a folder by their names in the family's table."""
    reader = Reader(folder)
    for old, new in family.renamed:
        reader.rename({name: re.sub(old, new, name) for name in reader.entries})
    if not any(name.startswith(family.prefix) for name in reader.entries):
        reader.rename({n: family.prefix + n for n in reader.entries if n != HEAD})
    quantization = read_object(folder / CONFIG).get("quantization_config")
    return Dequantizer(reader, quantization) if quantization else reader


def read_model(folder: Path) -> tuple[Family, ModelConfig]:
    """Return the family and the model of a folder, of its config.json and its tensors.

    A config.json may say that the head is the embedding, and the folder have another head. Then the
    model has its own head, as in transformers from version 5."""
    family, m = read_config(folder)
    if m.tied:
        reader = open_reader(folder, family)
        m = with_own_head(m, family, reader)
        reader.close()
    return family, m


def with_own_head(m: ModelConfig, family: Family, reader: Reader | Dequantizer) -> ModelConfig:
    """Return the model of config.json, with a head of its own if the folder has one."""
    names = [family.weights[path].name for path in ("embedding.w_tokens", "w_head")]
    own = m.tied and all(name in reader.entries for name in names) and not _equal(reader, *names)
    return replace(m, tied=False) if own else m


def _equal(reader: Reader | Dequantizer, a: str, b: str) -> bool:
    """Whether two matrices of a folder are equal. Reads a few rows at a time."""
    shape = reader.entries[a].shape
    if reader.entries[b].shape != shape or len(shape) != 2:
        return False
    boxes = ([rows, (0, shape[1])] for rows in row_chunks(*shape))
    return all(torch.equal(reader.read(a, box), reader.read(b, box)) for box in boxes)


def row_chunks(rows: int, columns: int) -> Iterator[Range]:
    """Yield ranges of rows that have a few million values each."""
    step = max(1, (1 << 22) // max(columns, 1))
    return ((a, min(a + step, rows)) for a in range(0, rows, step))


def tensor_table(family: Family, m: ModelConfig, reader: Reader | Dequantizer) -> Mapping[str, Row]:
    """Return the places of the weights in this folder, which may be stacked or tied."""
    table = dict(family.weights)
    stacked = [row.name.replace("{l}", r"\d+") for row in family.stacked.values()]
    if any(re.fullmatch(name, have) for name in stacked for have in reader.entries):
        table |= family.stacked
    embedding, head = table["embedding.w_tokens"], table["w_head"]
    if m.tied and embedding.name not in reader.entries and head.name in reader.entries:
        table["embedding.w_tokens"] = embedding._replace(name=head.name)
    return table
