"""Export of a run's newest checkpoint as a Hugging Face folder, one tensor at a time.

The Hugging Face tensors are listed in order, each with the dtron weights that it is made of. Each
tensor is made when it is written. So memory never holds more than one Hugging Face tensor and the
dtron weights in it. The folder gets its final name when it is complete. The model that the run
started from gives its tokenizer and the entries of config.json that training does not change.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtron import checkpoint
from dtron.checkpoint.storage import AnyPath
from dtron.data.special_tokens import end_id
from dtron.data.tokenization import load_tokenizer
from dtron.errors import UserError
from dtron.hf.config import CONFIG, best_family, family_of, text_entries, to_hf
from dtron.hf.families import FAMILIES
from dtron.hf.family import Family
from dtron.hf.load import Place, rotary_columns, weights_of
from dtron.hf.mup_factor import mup_factor
from dtron.hf.source_files import ORIGIN, TOKENIZER, copy_file
from dtron.hf.tensor_pattern import pairs, pattern
from dtron.hf.weight_files import write
from dtron.json_files import is_there, read_object
from dtron.layers.dora import DoRA
from dtron.layers.lora import LoRA
from dtron.layers.quantized_weight import dense
from dtron.model.config import ModelConfig
from dtron.model.lora import NO_LORA, LoraConfig, with_lora
from dtron.model.transformer import declare_model
from dtron.params import WeightSpec
from dtron.tree import fill, flat, units

_DROPPED_KEYS = (
    "rope_parameters",
    "torch_dtype",
    "quantization_config",
    "transformers_version",
    "auto_map",  # code, which is not copied
)


@dataclass(frozen=True)
class Exported:
    family: str
    step: int
    tensors: int
    bytes: int
    files: list[Path]


@dataclass(frozen=True)
class ExportOptions:
    """What is written.

    ``dtype``: dtype of the weights; None: the dtype of the model that the run began with, or
        bfloat16.
    ``family``: the model_type; None: the family of the model that the run began with, or the first
        family that can express this model.
    ``largest``: maximum bytes of one file.
    ``average``: the average of the weights, in place of the weights."""

    dtype: torch.dtype | None = None
    family: str | None = None
    largest: int = 5_000_000_000
    average: bool = False


def export(
    m: ModelConfig,
    found: AnyPath,
    run_dir: Path,
    out: Path,
    options: ExportOptions = ExportOptions(),
    lora: LoraConfig = NO_LORA,
    frozen: Callable[[WeightSpec], Tensor] | None = None,
) -> Exported:
    """Write the checkpoint ``found`` of the model ``m``, saved by the run in ``run_dir``, into
    ``out``. Updates are merged into their weights.

    ``out``: a folder that is empty or does not exist.
    ``lora``, ``frozen``: the updates in the checkpoint, and a function that loads a frozen weight.

    Raises UserError for a model that no family has, and if ``out`` cannot be written."""
    _check_empty(out)
    entries = _origin(run_dir)
    kind, dtype = _family(options.family, entries, m), options.dtype
    written = to_hf(m, kind)
    meta = checkpoint.read_meta(found)
    if options.average:
        checkpoint.check_average(found, meta)
    checkpoint.verify_checksums(found, meta)
    if dtype is None:
        name = entries.get("dtype") or entries.get("torch_dtype") or "bfloat16"
        dtype = {"float32": torch.float32, "float16": torch.float16}.get(name, torch.bfloat16)
    entries = {k: v for k, v in entries.items() if k not in _DROPPED_KEYS} or _tokens_of(run_dir)
    entries |= written | {"dtype": str(dtype).removeprefix("torch.")}
    with new_folder(out) as part:
        with checkpoint.ShardReader(found, meta) as reader:
            read: Callable = partial(checkpoint.read_weight, reader, average=options.average)
            if frozen is not None:
                read = merged(m, lora, read, frozen)
            maker = _Maker(m, kind, read, dtype)
            files = write(part, maker.shapes, dtype, maker, options.largest)
        (part / CONFIG).write_text(json.dumps(entries, indent=2) + "\n")
        _write_tokenizer(run_dir, part)
    size = sum(math.prod(shape) for shape in maker.shapes.values()) * dtype.itemsize
    return Exported(kind.kind, meta.step, len(maker.shapes), size, [out / f.name for f in files])


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to write into. It becomes ``out`` when the block ends, and is deleted after an
    error. Raises UserError if ``out`` is not empty or cannot be written."""
    _check_empty(out)
    part = out.with_name(out.name + ".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        if out.exists():
            out.rmdir()
        part.rename(out)
    except (OSError, UserError) as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{out}: cannot be written ({error.strerror}); free space, or choose another"
        ) from error


def _check_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is not empty, and nothing is written over; choose another folder")


def _origin(run_dir: Path) -> dict[str, Any]:
    """Return the entries of config.json of the text model that a run began with."""
    origin = run_dir / ORIGIN / CONFIG
    return dict(text_entries(read_object(origin))) if is_there(origin) else {}


def family_of_run(run_dir: Path, m: ModelConfig) -> Family:
    """Return the family of the model that a run began with, or the first family that can express
    the run's model."""
    return _family(None, _origin(run_dir), m)


def merged(
    m: ModelConfig,
    lora: LoraConfig,
    read: Callable[[WeightSpec], Tensor],
    frozen: Callable[[WeightSpec], Tensor],
) -> Callable[[WeightSpec], Tensor]:
    """Return a function that reads the whole weights of a model with updates merged into them.

    ``read``: reads a trained weight.
    ``frozen``: reads a frozen weight."""
    declared: dict[str, Any] = {}
    for place, node in zip(
        flat(declare_model(m)), units(with_lora(declare_model(m), lora)), strict=True
    ):
        declared[place.path] = node

    def load(w: WeightSpec) -> Tensor:
        return frozen(w) if w.frozen else read(w)

    def read_merged(w: WeightSpec) -> Tensor:
        made = fill(declared[w.path], load)
        return made.merged() if isinstance(made, (LoRA, DoRA)) else dense(made)

    return read_merged


def _family(wanted: str | None, entries: dict[str, Any], m: ModelConfig) -> Family:
    if wanted is not None:
        named = next((f for f in FAMILIES if f.kind == wanted), None)
        if named is None:
            raise UserError(
                f"--family {wanted}: is unknown; one of {', '.join(f.kind for f in FAMILIES)}"
            )
        return named
    return family_of(entries) if entries else best_family(m)


@dataclass
class _Maker:
    """Makes Hugging Face tensors by name.

    ``read``: reads one dtron weight.
    ``pieces``: for each Hugging Face tensor its dtron weights, each with its place and the number
    of the expert (None: the whole weight).
    ``held``: dtron weights that the current tensor needs."""

    m: ModelConfig
    family: Family
    read: Callable[[WeightSpec], Tensor]
    dtype: torch.dtype
    pieces: dict[str, list[tuple[WeightSpec, Place, int | None]]] = field(default_factory=dict)
    held: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for w, place in weights_of(self.m, self.family):
            for e, name in enumerate(place.names()):
                piece = (w, place, e if place.outside else None)
                self.pieces.setdefault(name, []).append(piece)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: pieces[0][1].shape for name, pieces in self.pieces.items()}

    def __call__(self, name: str) -> Tensor:
        pieces = self.pieces[name]
        out = torch.empty(pieces[0][1].shape, dtype=self.dtype)
        wanted = [w.path for w, _, _ in pieces]
        self.held = {path: x for path, x in self.held.items() if path in wanted}
        for w, place, e in pieces:
            if w.path not in self.held:
                self.held[w.path] = self.read(w) * mup_factor(self.m, w.path)
            x = self.held[w.path] if e is None else self.held[w.path][e]
            p = pattern(place.row.pattern)
            x = x - place.row.offset if place.row.offset else x
            if "v" in p.ours:
                x = x.narrow(p.ours.index("v"), 0, self.m.vocab)  # the other rows are padding
            x = pairs(x, rotary_columns(self.m)) if place.row.paired else x
            p.put(out, x.flip(0) if place.row.flipped else x, place.sizes)
        return out


def _write_tokenizer(run_dir: Path, out: Path) -> None:
    for name in TOKENIZER:
        copy_file(run_dir / ORIGIN / name, out / name)
    own = run_dir / "tokenizer.json"
    if is_there(own) and not (out / own.name).exists():
        tokenizer = load_tokenizer(str(own), flag="the tokenizer")
        copy_file(own, out / own.name)
        end = end_id(tokenizer, own)
        entries = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        entries |= {} if end is None else {"eos_token": tokenizer.id_to_token(end)}
        (out / "tokenizer_config.json").write_text(json.dumps(entries, indent=2) + "\n")


def _tokens_of(run_dir: Path) -> dict[str, Any]:
    """Return the special tokens of a run that made its own tokenizer."""
    file = run_dir / "tokenizer.json"
    if not is_there(file):
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    end = end_id(load_tokenizer(str(file), flag="the tokenizer"), file)
    return {"bos_token_id": None, "eos_token_id": end, "pad_token_id": None}
