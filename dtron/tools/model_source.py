"""The model of a command: a run directory or a Hugging Face folder, with the flags of its ranks."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dtron import checkpoint
from dtron.data.files import one_line
from dtron.data.special_tokens import end_id
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
from dtron.runtime.run_directory import read_run
from dtron.tree import fill


def model_folder(name: str) -> Path:
    """Return the folder of ``--from``, which may be a name on the Hugging Face hub."""
    try:
        name = hub_folder("--from", name)
    except OSError as error:  # a name that no file can have
        raise UserError(
            f"--from {name[:40]!a}: cannot be opened ({one_line(error)[:60]}); give a folder"
        ) from error
    return Path(name)


def run_config(o: Namespace, m: ModelConfig) -> RunConfig:
    """Return a config for these ranks. A config needs a batch and a sequence length, as for
    training: here the smallest that the mesh allows."""
    shape = MeshShape.parse(o.mesh, None if o.simulate else int(os.environ.get("WORLD_SIZE", 1)))
    if shape.cp > 1:
        raise UserError(
            f"--mesh {o.mesh}: cp shards sequences, and a step has single tokens; use dp or tp"
        )
    return RunConfig(
        mesh=str(shape),
        simulate=o.simulate,
        device=o.device,
        dtype=o.dtype,
        zero=0,
        compile="off",
        cuda_graph="off",
        batch=shape.data,
        micro_batch=1,
        data=DataConfig(seq_len=min(shape.tp, m.context)),
        model=m,
    )


class Opened(NamedTuple):
    """A model in a folder.

    ``load(spec, layout, dtype, device)``: loads its weights.
    ``model``, ``lora``: the model, and its updates."""

    load: Callable[..., Any]
    model: ModelConfig
    lora: LoraConfig


def open_model(folder: Path, average: bool, adapter: str | None = None) -> Opened:
    """Open a run directory or a Hugging Face folder.

    ``average``: the average of the weights, in place of the weights.
    ``adapter``: a folder of PEFT adapter files for the model."""
    if checkpoint.folder(folder).is_dir():
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
        return Opened(load, config.model, config.lora)
    if average:
        raise UserError(f"--from {folder}: a model's folder has no average; leave --ema out")
    source = Source(folder)
    if adapter is None:
        return Opened(source.load, source.model, NO_LORA)
    updates = Adapter(adapter, source.family, source.model)

    def load_both(spec: Any, layout: Layout, dtype: torch.dtype, device: str) -> Any:
        def load(w: WeightSpec) -> Tensor:
            return (updates if is_update(w) else source).weight(w, layout, dtype, device)

        return fill(spec, load)

    return Opened(load_both, source.model, updates.config)


def _load_run(
    found: Path,
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


def ends_of(folder: Path, tokenizer: Tokenizer) -> set[int]:
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


def add_model_flags(add: Callable[..., Any]) -> None:
    """Add the flags of a model and its ranks to a parser's."""
    add("--ema", action="store_true", help="use the average of the weights (--optim.ema)")
    add("--adapter", metavar="DIR", help="PEFT adapter files for the model of --from")
    add("--mesh", default="", metavar="MESH", help="axes of the mesh, as tp=2")
    add("--simulate", action="store_true", help="run all ranks in this one process, on the CPU")
    add(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto: a GPU if there is one",
    )
    dtypes = ["auto", "float32", "bfloat16", "float64"]
    add("--dtype", choices=dtypes, default="auto", help="auto: bfloat16 on a GPU, float32 on a CPU")
