"""``python -m dtron.generate``: generates text from a run or a Hugging Face folder.

runtime/generation.py has the steps of generation and the ways to sample.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dtron import checkpoint
from dtron.data.files import one_line
from dtron.data.special_tokens import end_id
from dtron.data.tokenization import NO_TOKEN, encoder_of, load_tokenizer, text_of
from dtron.data.tokenizer_library import library
from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.hf.adapter import Adapter
from dtron.hf.config import CONFIG
from dtron.hf.load import Source
from dtron.hf.source_files import ORIGIN
from dtron.json_files import is_there, read_object
from dtron.mesh import Layout
from dtron.model.config import ModelConfig
from dtron.model.lora import NO_LORA, LoraConfig, is_update
from dtron.params import WeightSpec
from dtron.runtime.config import DataConfig, RunConfig
from dtron.runtime.exit import Parser
from dtron.runtime.generation import Sampling, check_prompts, generate
from dtron.runtime.initial_state import initial_weight, source_of
from dtron.runtime.launch import plan_run, start_ranks
from dtron.runtime.output import write_line
from dtron.runtime.run_directory import read_run
from dtron.tree import fill


def run(o: Namespace) -> int:
    """Run the command."""
    check_sampling(o.tokens, o.temperature, o.top_p, o.seed)
    check_text(o.prompt)
    folder = _folder(o.folder)
    load_weights, m, lora = _open(folder, o.ema, o.adapter)
    if not is_there(folder / "tokenizer.json"):
        raise UserError(f"--from {folder}: has no tokenizer.json; put the model's tokenizer there")
    tokenizer = load_tokenizer(str(folder), flag="--from")
    encoder = encoder_of(tokenizer, special=True)  # without the padding that may be saved in it
    with library("--prompt: the tokenizer cannot encode it", NO_TOKEN):
        prompts = [encoder.encode(text).ids for text in o.prompt]
    check_prompts(prompts, o.tokens, m)
    config = replace(_run_config(o, m), lora=lora)
    plan = plan_run(config)
    ends, sampling = _ends(folder, tokenizer), Sampling(o.temperature, o.top_p, o.seed)
    with start_ranks(config, plan) as pipe:
        weights = load_weights(pipe.spec, pipe.layout, plan.compute, plan.device)
        texts = generate(weights, prompts, o.tokens, m, pipe, sampling, plan.device, ends)
    if plan.main:
        for ids in texts:
            write_line(sys.stdout, text_of(tokenizer, ids))
    return 0


def _folder(name: str) -> Path:
    try:
        Path(name).exists()
    except OSError as error:  # a name that no file can have
        raise UserError(
            f"--from {name[:40]!a}: cannot be opened ({one_line(error)[:60]}); give a folder"
        ) from error
    return Path(name)


def _run_config(o: Namespace, m: ModelConfig) -> RunConfig:
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


def _open(
    folder: Path, average: bool, adapter: str | None
) -> tuple[Callable[..., Any], ModelConfig, LoraConfig]:
    """Open a run directory or a Hugging Face folder. Return a function that loads its weights, its
    model, and the updates of the model.

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


def check_sampling(tokens: int, temperature: float, top_p: float, seed: int = 0) -> None:
    """Raise UserError for options that no text can be drawn with."""
    if tokens < 1:
        raise UserError(f"--tokens {tokens}: at least 1 is generated; raise it")
    if not 0 <= temperature < float("inf"):
        raise UserError(
            f"--temperature {temperature}: must be 0 (the most likely token) or more; change it"
        )
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p {top_p}: must be over 0 and at most 1 (all tokens); change it")
    if not -(2**63) <= seed < 2**64:
        raise UserError(f"--seed {seed}: must fit in 64 bits; choose a smaller one")


def check_text(prompts: Sequence[str]) -> None:
    """Raise UserError for a prompt that is not text. Python keeps bytes of a command line that are
    no UTF-8 as half surrogate pairs."""
    for text in prompts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"--prompt {text[:40]!a}: is not UTF-8 at character {error.start}; convert it"
            ) from error


def parser() -> Parser:
    made = Parser(
        prog="python -m dtron.generate", description="Generate text, on any mesh without cp."
    )
    add = made.add_argument
    add(
        "--from",
        dest="folder",
        required=True,
        metavar="DIR",
        help="a Hugging Face folder, or a run directory",
    )
    add(
        "--prompt",
        action="append",
        required=True,
        metavar="TEXT",
        help="text to continue; may be repeated",
    )
    add("--tokens", type=int, default=64, metavar="N", help="maximum number of new tokens (64)")
    add(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="divides the logits; 0 takes the most likely token (0.8)",
    )
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the most likely tokens that have this probability together (1)",
    )
    add("--seed", type=int, default=0, metavar="N", help="random seed (0)")
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
    return made


def main(argv: Sequence[str]) -> int:
    return run(parser().parse_args(list(argv)))
