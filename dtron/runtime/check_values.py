"""Checks of the values of flags: numbers and paths that no run can have, and flags without effect.

A config's own checks say which sizes fit together. Here is what holds for every field: a number is
finite and fits into 64 bits, a path is not empty and its names are not too long. Each check is made
once, where the command line is read.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from typing import Any

from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.renamed import dotted
from dtron.runtime.config import RunConfig
from dtron.training.batch_ramp import LARGEST_BATCH

_PATHS = (
    "run_dir",
    "checkpoint_store",
    "init_from",
    "compile_cache",
    "data.path",
    "data.tokenizer",
)
PROJECTS = {"wandb", "mlflow"}  # trackers with projects and names of runs
_LONGEST_NAME = 255  # bytes, on Linux's file systems
_LARGEST = {
    "batch": LARGEST_BATCH,
    "micro_batch": 10**8,
    "data.seq_len": 10**9,
    "sample_tokens": 10**6,
}


def check_values(config: Any) -> None:
    """Raise UserError for the first field whose value no run can have.

    ``config``: a config with nested configs."""
    for name, value in dotted(asdict(config)).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag} {value}: must be a finite number; change it")
        if isinstance(value, int) and not isinstance(value, bool):
            high = _LARGEST.get(name, (1 << 63) - 1)
            if value > high or value < -high:
                raise UserError(f"{flag} {value}: must be at most {high}; lower it")
        if isinstance(value, str) and name in _PATHS:
            check_path(flag, value)
            if name == "run_dir" and value.startswith("~"):
                raise UserError(
                    f"{flag} {value!r}: a shell replaces ~ only where a word begins with it; write "
                    f"{flag} ~/... with a space, or $HOME/..."
                )


def check_path(flag: str, value: str) -> None:
    """Raise UserError for a path that no file system has."""
    if not value.strip():
        raise UserError(f"{flag} {value!r}: is empty; give a path, or leave {flag} out")
    if "\0" in value:
        raise UserError(f"{flag} {value!r}: has a zero byte, which no path has; change it")
    for name in value.replace(",", "/").split("/"):
        size = len(os.fsencode(name.strip()))
        if size > _LONGEST_NAME:
            raise UserError(
                f"{flag} {value[:40]}...: a name in it has {size} bytes, and a file system takes "
                f"{_LONGEST_NAME}; shorten it"
            )


def check_unused(config: RunConfig, shape: MeshShape) -> None:
    """Raise UserError for a flag that has no effect beside the other flags."""
    usual, d = RunConfig(), config.data
    without = {
        "--cp-method": (config.cp_method != usual.cp_method and shape.cp == 1, "a mesh without cp"),
        "--pipeline.schedule": (
            config.pipeline.schedule != usual.pipeline.schedule and shape.pp == 1,
            "a mesh without pp",
        ),
        "--check-replicas-every": (
            config.check_replicas_every > 0 and (shape.size == 1 or config.simulate),
            "all ranks in one process",
        ),
        "--memory-copies-every": (
            config.memory_copies_every > 0 and config.simulate,
            "--simulate",
        ),
        "--memory-copies-dir": (
            config.memory_copies_dir is not None and not config.memory_copies_every,
            "no copies; give --memory-copies-every too",
        ),
        "--track-project": (
            config.track_project != usual.track_project and not set(config.trackers) & PROJECTS,
            "no tracker that has projects; give --track wandb or --track mlflow too",
        ),
        "--track-name": (
            config.track_name != usual.track_name and not set(config.trackers) & PROJECTS,
            "no tracker that names runs; give --track wandb or --track mlflow too",
        ),
        "--data.learn-next-document": (
            d.learn_next_document and not d.masked,
            "tokens that attend to all documents; give --data.document-mask",
        ),
    }
    for flag, (unused, beside) in without.items():
        if unused:
            raise UserError(f"{flag} has no effect with {beside}; leave {flag} out")
