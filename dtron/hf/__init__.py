"""Import and export of Hugging Face checkpoints: safetensors and config.json, no executable files.

``families``, ``config_keys`` and ``weight_tables`` have the tables, in the notation of
``tensor_pattern``. ``config``, ``rope_config`` and ``layer_types`` convert config.json.
``safetensors`` and ``safetensors_writer`` have the file format, and ``dequantize`` the formats of
quantised weights. ``open_folder`` opens a folder, ``load`` reads weights, and ``export`` writes
them. ``source_files`` keeps the small files of a loaded model.
"""

from dtron.hf.config import contradiction
from dtron.hf.load import Source
from dtron.hf.open_folder import read_model
from dtron.hf.source_files import keep_origin

__all__ = ["Source", "contradiction", "keep_origin", "read_model"]
