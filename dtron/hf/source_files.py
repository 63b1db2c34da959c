"""The small files of the model that a run began with: config and tokenizer, no weights."""

from __future__ import annotations

from pathlib import Path

from dtron.hf.config import CONFIG
from dtron.json_files import is_there, read_bytes

ORIGIN = "hf"  # folder of a run with the small files of the model that the run began with
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
_LARGEST = 1 << 28  # bytes


def keep_origin(folder: Path, run_dir: Path) -> None:
    """Copy the small files of the model that a run begins with into the run's directory."""
    (run_dir / ORIGIN).mkdir(exist_ok=True)
    for name in (CONFIG, *TOKENIZER):
        copy_file(folder / name, run_dir / ORIGIN / name)


def copy_file(source: Path, target: Path) -> None:
    """Copy a small file, if it is there. Raises UserError if it is not regular or too large."""
    if is_there(source):
        target.write_bytes(read_bytes(source, _LARGEST))
