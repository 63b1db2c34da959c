"""Export of a run's newest checkpoint: as a Hugging Face folder, or as PEFT adapter files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtron import checkpoint
from dtron.errors import UserError
from dtron.hf.adapter import write_adapter
from dtron.hf.export import Exported, ExportOptions, export, family_of_run, new_folder
from dtron.mesh import Layout
from dtron.params import WeightSpec
from dtron.runtime.initial_state import initial_weight, source_of
from dtron.runtime.run_directory import read_run


def export_run(run_dir: Path, out: Path, **options: Any) -> Exported:
    """Write the newest checkpoint of a run as a Hugging Face folder. The updates of LoRA are merged
    into their weights.

    ``options``: the fields of ``ExportOptions``."""
    config, newest = read_run(run_dir)
    what = ExportOptions(**options)
    if not config.lora.rank:
        return export(config.model, newest, run_dir, out, what)
    source = source_of(config)

    def frozen(w: WeightSpec) -> Tensor:
        loaded = initial_weight(w, config, source, Layout(), torch.float32, "cpu")
        assert loaded is not None  # no frozen weight is derived
        return loaded

    return export(config.model, newest, run_dir, out, what, config.lora, frozen)


def export_adapter(run_dir: Path, out: Path, average: bool = False) -> int:
    """Write the updates of a run's newest checkpoint as PEFT adapter files. Return the number of
    their tensors. Raises UserError for a run without updates, and for a run that trains other
    weights, too.

    ``average``: the averages of the updates."""
    config, newest = read_run(run_dir)
    lora = config.lora
    if not lora.rank:
        raise UserError(f"--adapter {run_dir}: was trained without LoRA; leave --adapter out")
    if lora.trained:
        raise UserError(
            f"--adapter {run_dir}: has trained {lora.trained} whole, and adapter files have only "
            "updates; leave --adapter out, which merges the updates into the model"
        )
    meta = checkpoint.read_meta(newest)
    if average:
        checkpoint.check_average(newest, meta)
    checkpoint.verify_checksums(newest, meta)
    family, base = family_of_run(run_dir, config.model), config.init_from or str(run_dir)
    with new_folder(out) as folder, checkpoint.ShardReader(newest, meta) as reader:
        read = partial(checkpoint.read_weight, reader, average=average)
        return write_adapter(folder, config.model, family, lora, read, base)
