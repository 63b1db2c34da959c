"""Checkpoints: ``state`` saves and loads a run on any mesh, ``files`` describes the files on disk,
``async_saver`` writes while training goes on."""

from dtron.checkpoint.async_saver import AsyncSaver
from dtron.checkpoint.files import FORMAT, folder, newest, read_meta
from dtron.checkpoint.state import (
    Identity,
    TrainState,
    load,
    load_params,
    read_into,
    read_weight,
    save,
    start_save,
    tensors,
    verify_checksums,
)

__all__ = [
    "FORMAT",
    "Identity",
    "AsyncSaver",
    "TrainState",
    "folder",
    "load",
    "load_params",
    "newest",
    "read_into",
    "read_meta",
    "read_weight",
    "save",
    "start_save",
    "tensors",
    "verify_checksums",
]
