"""A tokenizer.json that the library would not survive is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from dtron.data.tokenization import encoder_of, ids_of, load_tokenizer, text_of
from dtron.data.tokenizer_library import library, read_tokenizer
from dtron.runtime.output import complain
from tests.helpers import chats as styles
from tests.helpers.paths import ROOT
from tests.helpers.texts import one_line

LONGER = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
PIECE = {"SpecialToken": {"id": "absent", "type_id": 0}}
WHOLE = {"Sequence": {"id": "A", "type_id": 0}}
TWICE = {"type": "TemplateProcessing", "single": [WHOLE, WHOLE], "pair": [], "special_tokens": {}}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def replaced(pattern: dict[str, str]) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": "aa"}


DEADLY: dict[str, dict[str, Any]] = {
    "a damaged table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "an empty pattern": {"normalizer": replaced({"String": ""})},
    "a pattern of nothing": {"normalizer": replaced({"Regex": ""})},
    "pieces of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "an absent token": {"post_processor": {**TWICE, "single": [PIECE]}},
    "a decoder that cuts": {"decoder": {"type": "Strip", "content": "a", "start": 9, "stop": 9}},
    "letters doubled": {"normalizer": {"type": "Sequence", "normalizers": [LONGER] * 40}},
    "bytes of bytes": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 40}},
    "texts doubled": {"post_processor": {"type": "Sequence", "processors": [TWICE] * 40}},
    "decoded twice": {"decoder": {"type": "Sequence", "decoders": [LONGER] * 40}},
}
LOAD = """
import resource, sys
from dtron.data.tokenization import load_tokenizer
from dtron.runtime.exit import run_cli
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
encode = lambda argv: print(load_tokenizer(argv[0]).encode("a" * 99).ids) or 0
sys.exit(run_cli(encode, sys.argv[1:]))
"""


def changed(path: Path, change: dict[str, Any], kind: str = "bytes") -> Path:
    """Write a tokenizer.json with other parts."""
    parts = json.loads(styles.tokenizer_of(kind).to_str())
    path.write_text(json.dumps(parts | change))
    return path


@pytest.mark.parametrize("name", DEADLY)
def test_a_deadly_tokenizer_is_one_line(name, tmp_path):
    """In a process of its own: the library may take all memory, and prints lines of its own."""
    file = changed(tmp_path / "tokenizer.json", DEADLY[name])
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(file)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done
    assert "is not a valid tokenizer.json" in done.stderr


@pytest.mark.parametrize("kind", styles.KINDS)
def test_a_sound_tokenizer_is_read(kind, tmp_path):
    more = {
        "type": "Sequence",
        "normalizers": [{"type": "NFKC"}, replaced({"String": "``"}), {"type": "Lowercase"}],
    }
    for change in ({}, {"normalizer": more}):
        file = changed(tmp_path / "tokenizer.json", change, kind)
        assert read_tokenizer(file).to_str() == Tokenizer.from_file(str(file)).to_str()


def test_a_text_that_the_library_does_not_survive(tmp_path, capfd, monkeypatch):
    """Oniguruma gives a match up that takes too long, and the library panics."""
    split = {"type": "Split", "pattern": {"Regex": "(a|a)+$"}, "behavior": "Isolated"}
    file = changed(tmp_path / "tokenizer.json", {"pre_tokenizer": {**split, "invert": False}})
    encoder = encoder_of(load_tokenizer(str(file)))
    assert ids_of(encoder, ["b"])
    one_line(lambda: ids_of(encoder, ["a" * 40 + "b"]), "--data.tokenizer", "retry-limit")
    assert capfd.readouterr().err == ""  # the library's lines are hidden
    monkeypatch.setattr(sys, "stderr", os.fdopen(2, "w", closefd=False))
    with library("what", "remedy"):
        os.write(2, b"of the library\n")
        complain("of a thread")
    complain("of the program")
    assert capfd.readouterr().err == "of a thread\nof the program\n"


def test_ids_that_the_library_does_not_survive():
    tokenizer = styles.tokenizer_of("bytes")
    one_line(lambda: text_of(tokenizer, [-1]), "cannot decode ids")
