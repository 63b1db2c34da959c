"""A run's directory: its resolved config, its checkpoints, and a record of every start.

``RunDirectory`` is the directory that a run writes. ``read_run`` and ``export_run`` are for
programs that read the directory of another run.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dtron import checkpoint
from dtron.checkpoint.files import clear_parts
from dtron.data import Data
from dtron.data.special_tokens import save_tokenizer
from dtron.errors import UserError
from dtron.hf import keep_origin
from dtron.hf.config import CONFIG
from dtron.hf.export import Exported, export
from dtron.runtime import cli
from dtron.runtime.config import RunConfig
from dtron.training.config import RunPlan


@dataclass(frozen=True)
class RunDirectory:
    """The directory that a run writes to.

    ``resumed``: the checkpoint to resume from, or None."""

    path: Path
    resumed: Path | None

    @classmethod
    def open(cls, config: RunConfig) -> RunDirectory:
        """Create the directory and find the checkpoint to resume from: with --resume, or if
        torchrun has started this process again. Raises UserError if the directory cannot be
        written, has nothing to resume, or holds another run that training would overwrite."""
        path = Path(config.run_dir)
        newest = checkpoint.newest(path)
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        if config.resume and not newest:
            raise UserError(
                f"--resume: {path} has no checkpoint; drop --resume, or train with --save-every"
            )
        if newest and not (config.resume or restarted):
            raise UserError(
                f"--run-dir {path}: holds checkpoints of another run, up to {newest.name}; go on "
                "from there with --resume, choose another --run-dir, or delete it"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise UserError(
                f"--run-dir {path}: cannot be written ({error.strerror}); choose another"
            ) from error
        return cls(path, newest)

    def begin(self, config: RunConfig, plan: RunPlan, data: Data, step: int) -> None:
        """Write the files that are known before the first step: the resolved config, the tokenizer
        with its end token, the small files of ``config.init_from``, and a line of ``starts.jsonl``.

        ``step``: the step after which training starts."""
        clear_parts(self.path)
        cli.save(config, self.path / CONFIG)
        if config.init_from and not self.resumed:
            keep_origin(Path(config.init_from), self.path)
        if data.tokenizer is not None:
            save_tokenizer(data.tokenizer, self.path / "tokenizer.json", data.end)
        with (self.path / "starts.jsonl").open("a") as file:
            file.write(json.dumps(_start(plan, step)) + "\n")


def _start(plan: RunPlan, step: int) -> dict[str, Any]:
    """Return the record of a start: time, step, versions, mesh, device and dtypes."""
    gpu = plan.device.startswith("cuda")
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "commit": _commit(),
        "dtron": _version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "mesh": str(plan.shape),
        "device": torch.cuda.get_device_name(plan.device) if gpu else "cpu",
        "compute": str(plan.compute).removeprefix("torch."),
        "master": str(plan.master).removeprefix("torch."),
    }


def _version() -> str | None:
    """Return dtron's version. None if it is not installed, only on the path."""
    try:
        return version("dtron")
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of dtron's checkout, with ``-dirty`` if files differ from it. None outside
    a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def read_run(run_dir: Path) -> tuple[RunConfig, Path]:
    """Return the config and the newest whole checkpoint of a run."""
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
    newest = checkpoint.newest(run_dir)
    if newest is None:
        raise UserError(f"{run_dir}: has no checkpoint; train with --save-every")
    return config, newest


def export_run(run_dir: Path, out: Path, **options: Any) -> Exported:
    """Write the newest checkpoint of a run as a Hugging Face folder.

    ``options``: the options of ``export``."""
    config, newest = read_run(run_dir)
    return export(config.model, newest, run_dir, out, **options)
