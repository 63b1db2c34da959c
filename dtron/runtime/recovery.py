"""The copies in memory of a run: where they are, and whether a new start reads them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from dtron.checkpoint.copy_files import key_of
from dtron.checkpoint.memory_copies import MemoryCopies
from dtron.runtime.config import RunConfig
from dtron.runtime.launch import host_group
from dtron.training.config import RunPlan
from dtron.training.pipeline import Pipeline

MEMORY = Path("/dev/shm")


def folder_of(config: RunConfig) -> Path:
    """Return the folder of a run's copies on this host."""
    if config.memory_copies_dir:
        return Path(config.memory_copies_dir)
    run_dir = os.fsencode(Path(config.run_dir).resolve())
    return MEMORY / f"dtron-{hashlib.sha256(run_dir).hexdigest()[:12]}"


def memory_copies(
    config: RunConfig, plan: RunPlan, pipe: Pipeline, identity: dict[str, Any]
) -> MemoryCopies:
    """Return the copies of a run. They are read if the run resumes, or if torchrun has started this
    process again.

    ``identity``: the settings that must be the same."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    settings = {"mesh": str(plan.shape), "zero": config.zero, "optim": config.optim, **identity}
    return MemoryCopies(
        folder_of(config),
        config.memory_copies_every,
        key_of(settings),
        pipe.spec,
        restarted or config.resume != "off",
        host_group(config.timeout_seconds) if config.memory_copies_every else None,
        int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    )
