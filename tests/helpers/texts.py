"""Documents and a user's files, as the tests of dtron.data want them."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from dtron.errors import UserError

TEXTS = [f"def f{i}(x):\n    return x + {i}  # naïve 😀\n" for i in range(200)]


def one_line(call, *parts: str) -> None:
    """The call fails with a plain ValueError whose message is one line and holds every part."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is UserError, repr(caught.value)
    assert "\n" not in message and len(message) < 500
    for part in parts:
        assert part in message, f"{part!r} is not in: {message}"


def words(vocab: dict[str, int], path: Path) -> str:
    """A user's tokenizer.json: whole words, nothing else."""
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=next(iter(vocab))))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    return str(path)


def corpus(folder: Path) -> Path:
    """TEXTS as a file."""
    file = folder / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS), encoding="utf-8")
    return file
