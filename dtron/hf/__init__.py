"""Hugging Face checkpoints in and out: safetensors and config.json, nothing that runs.

``families.py`` has the tables, ``pattern.py`` the notation they are written in, ``safetensors.py``
the file format, ``load.py`` and ``export.py`` the two directions.
"""

from dtron.hf.config import contradiction, read_config
from dtron.hf.load import Source
from dtron.hf.source_files import keep_origin

__all__ = ["Source", "contradiction", "keep_origin", "read_config"]
