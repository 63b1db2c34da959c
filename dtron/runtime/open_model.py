"""Opens a model to generate with or to evaluate: a run directory or a Hugging Face folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dtron import checkpoint
from dtron.checkpoint.storage import AnyPath
from dtron.data.files import one_line
from dtron.data.special_tokens import end_id
from dtron.data.tokenization import encoder_of, load_tokenizer
from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.hf.adapter import Adapter
from dtron.hf.config import CONFIG
from dtron.hf.hub import hub_folder
from dtron.hf.load import Source
from dtron.hf.source_files import ORIGIN
from dtron.json_files import is_there, read_object
from dtron.mesh import Layout
from dtron.model.config import ModelConfig
from dtron.model.lora import NO_LORA, LoraConfig, is_update
from dtron.params import WeightSpec
from dtron.runtime.config import DataConfig, RunConfig
from dtron.runtime.initial_state import initial_weight, source_of
from dtron.runtime.run_directory import is_run, read_run
from dtron.tree import fill

LoadWeights = Callable[[Any, Layout, torch.dtype, str], Any]


@dataclass(frozen=True)
class OpenModel:
    """A model that can generate.

    ``folder``: where it is.
    ``load``: loads the weights, as ``load(spec, layout, dtype, device)``.
    ``lora``: the updates of the model.
    ``tokenizer``: neither truncates nor pads, and knows special tokens that are spelled out.
    ``ends``: the tokens that end a text."""

    folder: Path
    load: LoadWeights
    model: ModelConfig
    lora: LoraConfig
    tokenizer: Tokenizer
    ends: frozenset[int]

    def config(
        self, mesh: str = "", simulate: bool = False, device: Any = "auto", dtype: Any = "auto"
    ) -> RunConfig:
        """Return a config for these ranks. A config needs a batch and a sequence length, as for
        training: here the smallest that the mesh allows. Raises UserError for a mesh with cp."""
        shape = MeshShape.parse(mesh, None if simulate else int(os.environ.get("WORLD_SIZE", 1)))
        if shape.cp > 1:
            raise UserError(
                f"--mesh {mesh}: cp shards sequences, and a step has single tokens; use dp or tp"
            )
        return RunConfig(
            mesh=str(shape),
            simulate=simulate,
            device=device,
            dtype=dtype,
            zero=0,
            compile="off",
            cuda_graph="off",
            batch=shape.data,
            micro_batch=1,
            data=DataConfig(seq_len=min(shape.tp, self.model.context)),
            model=self.model,
            lora=self.lora,
        )


def open_model(name: str, average: bool = False, adapter: str | None = None) -> OpenModel:
    """Open a run directory or a Hugging Face folder. Raises UserError if it is neither, or has no
    tokenizer.

    ``average``: the average of the weights, in place of the weights.
    ``adapter``: a folder of PEFT adapter files for the model."""
    folder = _folder(name)
    load, model, lora = _open(folder, average, adapter)
    if not is_there(folder / "tokenizer.json"):
        raise UserError(f"--from {folder}: has no tokenizer.json; put the model's tokenizer there")
    tokenizer = load_tokenizer(str(folder), flag="--from")
    ends = frozenset(_ends(folder, tokenizer))
    return OpenModel(folder, load, model, lora, encoder_of(tokenizer, special=True), ends)


def _folder(name: str) -> Path:
    try:
        name = hub_folder("--from", name)
        Path(name).exists()
    except OSError as error:  # a name that no file can have
        raise UserError(
            f"--from {name[:40]!a}: cannot be opened ({one_line(error)[:60]}); give a folder"
        ) from error
    return Path(name)


def _open(
    folder: Path, average: bool, adapter: str | None
) -> tuple[LoadWeights, ModelConfig, LoraConfig]:
    """Return a function that loads the weights of a folder, its model, and the updates of the
    model; see ``open_model``."""
    if (folder / checkpoint.FOLDER).is_dir() or is_run(folder):
        config, found = read_run(folder)
        if adapter is not None:
            raise UserError(f"--adapter {adapter}: is for the folder of a model; leave it out")
        meta = checkpoint.read_meta(found)  # raises UserError if it is incomplete
        if average:
            checkpoint.check_average(found, meta)
        load = partial(
            _load_run,
            found,
            config,
            source=source_of(config) if config.lora.rank else None,
            average=average,
        )
        return load, config.model, config.lora
    if average:
        raise UserError(f"--from {folder}: a model's folder has no average; leave --ema out")
    source = Source(folder)
    if adapter is None:
        return source.load, source.model, NO_LORA
    updates = Adapter(adapter, source.family, source.model)

    def load_both(spec: Any, layout: Layout, dtype: torch.dtype, device: str) -> Any:
        def load(w: WeightSpec) -> Tensor:
            return (updates if is_update(w) else source).weight(w, layout, dtype, device)

        return fill(spec, load)

    return load_both, source.model, updates.config


def _load_run(
    found: AnyPath,
    config: RunConfig,
    spec: Any,
    layout: Layout,
    dtype: torch.dtype,
    device: str,
    source: Source | None,
    average: bool,
) -> Any:
    """Load the weights of a run: its trained weights from the checkpoint ``found``, and its frozen
    weights from where the run began."""

    def frozen(w: WeightSpec) -> Tensor:
        loaded = initial_weight(w, config, source, layout, dtype, device)
        assert loaded is not None  # no frozen weight is derived
        return loaded

    return checkpoint.load_params(found, spec, layout, dtype, device, average, frozen)


def _ends(folder: Path, tokenizer: Tokenizer) -> set[int]:
    """Return the tokens that end a text: from the model's config, or else from its tokenizer.

    A run directory has the config of the model that the run began with in a folder of its own."""
    for place in (folder, folder / ORIGIN):
        for name in ("generation_config.json", CONFIG):
            if is_there(place / name):
                ids = read_object(place / name).get("eos_token_id")
                if ids is not None:
                    return set(_ids(ids, place / name))
    end = end_id(tokenizer, folder)
    return set() if end is None else {end}


def _ids(value: Any, where: Path) -> list[int]:
    """Return a token id or a list of ids as a list. Raises UserError for any other value."""
    ids = value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise UserError(f"{where}: eos_token_id is {value!r}, and must be an id or a list of ids")
    return ids
