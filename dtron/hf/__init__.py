"""Import and export of Hugging Face checkpoints: safetensors and config.json, no executable files.

``families`` and ``weight_tables`` have the tables, in the notation of ``tensor_pattern``.
``config`` converts config.json. ``safetensors`` reads and writes the file format. ``load`` reads
weights, and ``export`` writes them. ``source_files`` keeps the small files of a loaded model.
"""

from dtron.hf.config import contradiction, read_config
from dtron.hf.load import Source
from dtron.hf.source_files import keep_origin

__all__ = ["Source", "contradiction", "keep_origin", "read_config"]
