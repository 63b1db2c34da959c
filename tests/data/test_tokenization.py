"""dtron.data.tokenization and .cache: lossless tokens, and a cache that can be trusted."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from dtron.data import cache_dir, encode, end_id, get_tokenizer, tokenization
from dtron.data.cache import cached, digest
from dtron.data.documents import documents
from tests.helpers.texts import TEXTS, corpus, one_line, words


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tokenizer(cache: Path) -> Tokenizer:
    return get_tokenizer(None, TEXTS, 400, cache)


def test_the_trained_tokenizer_is_byte_level_and_repeatable(tokenizer: Tokenizer, tmp_path: Path):
    assert tokenizer.token_to_id("<|endoftext|>") == end_id(tokenizer) == 0
    assert 257 < tokenizer.get_vocab_size() <= 400
    again = get_tokenizer(None, TEXTS, 400, tmp_path)
    assert again.to_str() == tokenizer.to_str()
    assert get_tokenizer(None, TEXTS, 300, tmp_path).get_vocab_size() <= 300


@settings(deadline=None)
@given(st.lists(st.text(max_size=60), max_size=6))
def test_decoding_gives_back_every_document(cache: Path, tokenizer: Tokenizer, docs: list[str]):
    check_round_trip(docs, tokenizer, cache)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text("ab\n é😀", max_size=60), max_size=6))
def test_long_documents_are_encoded_in_pieces(
    tokenizer: Tokenizer, tmp_path_factory, docs: list[str]
):
    # A separate cache: the size of a piece is a constant and not part of the key.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenization, "_PIECE", 7)
        patch.setattr(tokenization, "_BATCH", 20)
        check_round_trip(docs, tokenizer, tmp_path_factory.mktemp("pieces"))


def check_round_trip(docs: list[str], tokenizer: Tokenizer, cache: Path) -> None:
    ids = encode(docs, tokenizer, cache)
    assert ids.dtype == np.uint16 and not ids.flags.writeable
    ends = np.flatnonzero(ids == 0)
    assert len(ends) == len(docs) and (not docs or ends[-1] == len(ids) - 1)
    starts = [0, *(ends + 1)]
    assert [tokenizer.decode(ids[s:e]) for s, e in zip(starts, ends, strict=False)] == docs


def test_a_spelled_out_end_of_text_ends_nothing(tokenizer: Tokenizer, cache: Path):
    ids = encode(["a<|endoftext|>b"], tokenizer, cache)
    assert np.flatnonzero(ids == 0).tolist() == [len(ids) - 1]
    assert tokenizer.decode(ids[:-1]) == "a<|endoftext|>b"


def test_a_users_tokenizer(tmp_path: Path, cache: Path):
    plain = get_tokenizer(words({"?": 0, "a": 1, "b": 2}, tmp_path / "plain.json"), [], 3, cache)
    assert end_id(plain) is None
    plain.enable_truncation(
        2
    )  # a saved tokenizer may have these settings, which drop or add tokens
    plain.enable_padding(length=9)
    assert encode(["a b", "b a c a"], plain, cache).tolist() == [1, 2, 2, 1, 0, 1]
    ended = get_tokenizer(words({"?": 0, "</s>": 1, "a": 2}, tmp_path / "ended.json"), [], 3, cache)
    assert encode(["a", "a a"], ended, cache).tolist() == [2, 1, 2, 2, 1]
    large = get_tokenizer(words({"?": 0, "a": 70_000}, tmp_path / "large.json"), [], 70_001, cache)
    ids = encode(["a ? a"], large, cache)
    assert ids.dtype == np.uint32 and ids.tolist() == [70_000, 0, 70_000]


def test_tokenizer_errors(tmp_path: Path, cache: Path):
    def load(path: str, vocab: int = 300):
        return lambda: get_tokenizer(path, TEXTS, vocab, cache)

    missing, bad = str(tmp_path / "missing.json"), tmp_path / "bad.json"
    one_line(load(missing), missing, "--data.tokenizer", "does not exist", "leave it out")
    bad.write_text('{"version": "1.0",\n')
    one_line(load(str(bad)), str(bad), "not a valid tokenizer.json", "leave it out")
    one_line(load(str(tmp_path)), str(tmp_path), "not a valid tokenizer.json")
    five = words({w: i for i, w in enumerate("?abcd")}, tmp_path / "five.json")
    one_line(load(five, 4), five, "5 tokens", "only 4", "--model.vocab 5")
    gaps = words(
        {"?": 0, "a": 9}, tmp_path / "gaps.json"
    )  # two tokens, but an embedding needs ten rows
    one_line(load(gaps, 9), "10 tokens", "--model.vocab 10")
    one_line(
        lambda: get_tokenizer(None, TEXTS, 256, cache), "--model.vocab 256", "--model.vocab 257"
    )
    narrow = Tokenizer(models.WordLevel({"a": 0}, unk_token="?"))
    one_line(lambda: encode(["b"], narrow, cache), "--data.tokenizer", "unknown token")


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "short", "zeros", "pipe"])
@pytest.mark.parametrize("which", ["tokens-*.uint16", "tokenizer-*.json"])
def test_a_damaged_cache_is_rebuilt(which: str, damage: str, tmp_path: Path):
    def start() -> np.ndarray:
        return encode(TEXTS, get_tokenizer(None, TEXTS, 400, tmp_path), tmp_path)

    before = np.array(start())  # a copy: the file under the memory map is about to change
    (file,) = tmp_path.glob(which)
    good = file.read_bytes()
    flipped = bytes([good[0] ^ 1]) + good[1:]
    damaged = {"cut": good[:-2], "flip": flipped, "short": good[:3], "zeros": bytes(4)}
    file.unlink()
    if damage == "pipe":
        os.mkfifo(file)
    else:
        file.write_bytes(damaged.get(damage, b""))
    assert np.array_equal(start(), before)
    assert file.read_bytes() == good


def test_a_cache_entry_is_never_visible_half_written(tmp_path: Path):
    target = tmp_path / "entry"

    def read(file: Path) -> bytes | None:
        return file.read_bytes() if file.exists() else None

    def fail(file: Path) -> None:
        file.write_bytes(b"half")
        assert read(target) is None
        raise KeyError("stopped")

    (tmp_path / "entry.0123.tmp").write_bytes(b"of a process that was killed")
    (tmp_path / "other.0123.tmp").write_bytes(b"of a process that works")
    with pytest.raises(KeyError):
        cached(target, read, fail)
    (tmp_path / "other.0123.tmp").unlink()
    assert {file.name for file in tmp_path.iterdir()} <= {"entry.lock"}
    assert cached(target, read, lambda file: file.write_bytes(b"whole")) == b"whole"
    assert cached(target, read, fail) == b"whole"
    answers = iter(
        [None, b"theirs"]
    )  # another process built the cache while this process waited for the lock
    assert cached(target, lambda file: next(answers), fail) == b"theirs"


def test_the_cache_folder(tmp_path: Path, monkeypatch):
    corpus_file = corpus(tmp_path)
    monkeypatch.setenv("DTRON_CACHE", str(tmp_path / "elsewhere"))
    assert cache_dir() == tmp_path / "elsewhere"
    monkeypatch.delenv("DTRON_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "dtron"
    inside_a_file = corpus_file / "cache"
    one_line(
        lambda: get_tokenizer(None, TEXTS, 400, inside_a_file), str(inside_a_file), "DTRON_CACHE"
    )
    one_line(
        lambda: documents(str(corpus_file), cache=inside_a_file), str(inside_a_file), "DTRON_CACHE"
    )

    proc = Path("/proc")  # no file can be made there, and the lock would wait for ever
    if proc.is_dir():
        one_line(lambda: get_tokenizer(None, TEXTS, 400, proc), "/proc", "DTRON_CACHE")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dtron.data.cache.SealedFile.write", full)
    one_line(
        lambda: documents(str(corpus_file), cache=tmp_path / "c"), "No space left", "DTRON_CACHE"
    )


def test_a_digest_keeps_its_parts_apart():
    assert digest(["ab", "c"]) == digest([b"ab", "c"])
    assert (
        len({digest(parts) for parts in (["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], [])}) == 5
    )
