"""The small files of the model that a run began with: config and tokenizer, no weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from dtron.hf.config import CONFIG

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


def keep_origin(folder: Path, run_dir: Path) -> None:
    """Copy the small files of the model that a run begins with into the run's directory."""
    (run_dir / ORIGIN).mkdir(exist_ok=True)
    for name in (CONFIG, *TOKENIZER):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, run_dir / ORIGIN / name)
