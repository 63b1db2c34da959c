"""A run's directory: its config and its newest checkpoint, for programs that read what a run
wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dtron import checkpoint
from dtron.errors import UserError
from dtron.hf.config import CONFIG
from dtron.hf.export import Exported, export
from dtron.runtime import cli
from dtron.runtime.config import RunConfig


def read_run(run_dir: Path) -> tuple[RunConfig, Path]:
    """The config and the newest whole checkpoint of a run."""
    if not (run_dir / CONFIG).is_file():
        raise UserError(
            f"{run_dir}: has no {CONFIG}, it is no run directory; give one that train.py wrote"
        )
    try:
        config = cli.load(run_dir / CONFIG)
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{run_dir / CONFIG}: is no config of a run ({error}); give a run directory"
        ) from error
    found = checkpoint.newest(run_dir)
    if found is None:
        raise UserError(f"{run_dir}: has no checkpoint; train with --save-every")
    return config, found


def export_run(run_dir: Path, out: Path, **options: Any) -> Exported:
    """Write the newest checkpoint of a run as a Hugging Face folder. ``options`` are those of
    ``export``."""
    config, found = read_run(run_dir)
    return export(config.model, found, run_dir, out, **options)
