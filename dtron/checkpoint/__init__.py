"""Checkpoints: ``state`` saves and loads a run on any mesh, ``meta`` and ``files`` describe the
files on disk, ``shards`` is what each rank writes and reads, and ``async_saver`` writes while
training goes on."""

from typing import TYPE_CHECKING

from dtron.lazy_names import lazy_names

if TYPE_CHECKING:
    from dtron.checkpoint.async_saver import AsyncSaver
    from dtron.checkpoint.files import FOLDER, folder, newest, read_meta
    from dtron.checkpoint.meta import FORMAT, Meta
    from dtron.checkpoint.shards import ShardReader
    from dtron.checkpoint.state import (
        Identity,
        TrainState,
        check_average,
        load,
        load_params,
        read_weight,
        save,
        start_save,
        tensors,
        verify_checksums,
    )

_NAMES = {
    "async_saver": ["AsyncSaver"],
    "files": ["FOLDER", "folder", "newest", "read_meta"],
    "meta": ["FORMAT", "Meta"],
    "shards": ["ShardReader"],
    "state": [
        "Identity",
        "TrainState",
        "check_average",
        "load",
        "load_params",
        "read_weight",
        "save",
        "start_save",
        "tensors",
        "verify_checksums",
    ],
}

__all__ = [  # noqa: F822
    "FOLDER",
    "FORMAT",
    "Identity",
    "AsyncSaver",
    "Meta",
    "ShardReader",
    "TrainState",
    "check_average",
    "folder",
    "load",
    "load_params",
    "newest",
    "read_meta",
    "read_weight",
    "save",
    "start_save",
    "tensors",
    "verify_checksums",
]

__getattr__ = lazy_names(__name__, _NAMES)
