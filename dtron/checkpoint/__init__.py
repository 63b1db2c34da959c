"""Checkpoints: ``state`` saves and loads a run on any mesh, ``files`` is what lies on the disk,
``async_saver`` writes while training goes on."""

from dtron.checkpoint.async_saver import AsyncSaver
from dtron.checkpoint.files import FORMAT, folder, newest, read_meta
from dtron.checkpoint.state import (
    Identity,
    TrainState,
    begin,
    load,
    load_params,
    read_into,
    read_weight,
    save,
    tensors,
    verify_checksums,
)

__all__ = [
    "FORMAT",
    "Identity",
    "AsyncSaver",
    "TrainState",
    "begin",
    "folder",
    "load",
    "load_params",
    "newest",
    "read_into",
    "read_meta",
    "read_weight",
    "save",
    "tensors",
    "verify_checksums",
]
