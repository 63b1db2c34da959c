"""Documents and files of a user, for the tests of dtron.data."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from dtron.errors import UserError

TEXTS = [f"def f{i}(x):\n    return x + {i}  # naïve 😀\n" for i in range(200)]


def one_line(call, *parts: str) -> None:
    """Assert that the call raises UserError with a message of one line that has every part."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is UserError, repr(caught.value)
    assert "\n" not in message and len(message) < 500
    for part in parts:
        assert part in message, f"{part!r} is not in: {message}"


def words(vocab: dict[str, int], path: Path) -> str:
    """Write a tokenizer.json that encodes whole words and nothing else."""
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=next(iter(vocab))))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    return str(path)


def corpus(folder: Path) -> Path:
    """Write TEXTS to a file."""
    file = folder / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS), encoding="utf-8")
    return file
