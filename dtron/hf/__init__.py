"""Import and export of Hugging Face checkpoints: safetensors and config.json, no executable files.

``families``, ``config_keys`` and ``weight_tables`` have the tables, in the notation of
``tensor_pattern``. ``config``, ``rope_config`` and ``layer_types`` convert config.json.
``safetensors`` and ``safetensors_writer`` have the file format, and ``dequantize`` the formats of
quantised weights. ``open_folder`` opens a folder, ``load`` reads weights, and ``export`` writes
them. ``source_files`` keeps the small files of a loaded model.
"""

from typing import TYPE_CHECKING

from dtron.lazy_names import lazy_names

if TYPE_CHECKING:
    from dtron.hf.config import contradiction
    from dtron.hf.load import Source
    from dtron.hf.open_folder import read_model
    from dtron.hf.source_files import keep_origin

_NAMES = {
    "config": ["contradiction"],
    "load": ["Source"],
    "open_folder": ["read_model"],
    "source_files": ["keep_origin"],
}

__all__ = ["Source", "contradiction", "keep_origin", "read_model"]  # noqa: F822

__getattr__ = lazy_names(__name__, _NAMES)
