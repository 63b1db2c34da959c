"""dtron.data.chunks: samples, their order and the split. All of dtron.data on two processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtron.data import Documents, document_ids, open_data, rows
from dtron.data.__main__ import main
from dtron.data.open import beside
from dtron.runtime.config import DataConfig
from tests.helpers.paths import ROOT
from tests.helpers.texts import TEXTS, corpus, one_line


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    return corpus(tmp_path)


LENGTHS = st.integers(1, 9).flatmap(lambda s: st.tuples(st.just(s), st.integers(s + 1, 90)))


@given(
    LENGTHS,
    st.integers(0, 2**40),
    st.integers(0, 200),
    st.lists(st.integers(0, 20), max_size=5),
    st.booleans(),
)
def test_a_range_is_the_concatenation_of_its_pieces(lengths, seed, start, counts, shuffle):
    seq_len, length = lengths
    data = np.arange(length, dtype=np.uint16)
    whole = rows(data, seq_len, seed, start, sum(counts), shuffle)
    starts = start + np.cumsum([0, *counts])
    pieces = [
        rows(data, seq_len, seed, int(s), c, shuffle) for s, c in zip(starts, counts, strict=False)
    ]
    assert whole.dtype == np.int64 and whole.shape == (sum(counts), seq_len + 1)
    assert np.array_equal(whole, np.concatenate([whole[:0], *pieces]))


@given(LENGTHS, st.integers(0, 2**40), st.integers(0, 3))
def test_an_epoch_takes_every_chunk_once(lengths, seed, epoch):
    seq_len, length = lengths
    chunks = (length - 1) // seq_len
    taken = rows(np.arange(length), seq_len, seed, epoch * chunks, chunks)
    assert sorted(taken[:, 0]) == [chunk * seq_len for chunk in range(chunks)]
    # Targets are inputs shifted by one, and the last target is the first input of the next chunk.
    assert np.array_equal(taken[:, 1:], taken[:, :-1] + 1)
    assert sorted(taken[:, 1:].ravel()) == list(range(1, chunks * seq_len + 1))


def test_epochs_and_seeds_have_their_own_order():
    data = np.arange(201)
    first, second = rows(data, 2, 0, 0, 100), rows(data, 2, 0, 100, 100)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, rows(data, 2, 1, 0, 100))
    assert np.array_equal(rows(data, 2, 0, 0, 100, shuffle=False)[:, 0], np.arange(0, 200, 2))
    assert np.array_equal(rows(data, 2, 0, 100, 100, shuffle=False)[:, 0], np.arange(0, 200, 2))


def test_the_order_is_a_fixed_one():
    """A checkpoint stores the position only. With another order, old runs would resume wrongly."""
    first, second = [14, 8, 12, 2, 10, 0, 4, 6], [14, 8, 6, 0, 2, 10, 4, 12]
    assert rows(np.arange(17), 2, 7, 0, 16)[:, 0].tolist() == first + second


def test_rows_rejects_what_it_cannot_serve():
    one_line(lambda: rows(np.arange(8), 8, 0, 0, 1), "8 tokens", "9", "--data.seq-len")
    one_line(lambda: rows(np.arange(8), 0, 0, 0, 1), "--data.seq-len 0", "1 or more")
    one_line(lambda: rows(np.arange(8), 2, 0, -1, 1), "start -1", "count from 0")


def test_document_ids_on_a_written_out_row():
    given_rows = np.array([[5, 6, 0, 7, 0, 0, 8], [0, 1, 2, 3, 4, 5, 0]])
    ids, positions = document_ids(given_rows, 0)
    assert ids.tolist() == [[0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 0], [0, 0, 1, 2, 3, 4, 5]]
    ids, positions = document_ids(given_rows, None)
    assert not ids.any() and positions.tolist() == [list(range(7))] * 2


@given(st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=4))
def test_document_ids_agree_with_a_loop(given_rows):
    ids, positions = document_ids(np.array(given_rows), 0)
    for row, row_ids, row_positions in zip(given_rows, ids, positions, strict=True):
        document = position = 0
        for token, got_id, got_position in zip(row, row_ids, row_positions, strict=True):
            assert (got_id, got_position) == (document, position)
            document, position = (document + 1, 0) if token == 0 else (document, position + 1)


def config(file: Path, seq_len: int = 16, fraction: float = 0.1, **more) -> DataConfig:
    return DataConfig(path=str(file), seq_len=seq_len, validation_ratio=fraction, **more)


def test_a_corpus_is_split_and_comes_back_from_the_cache(
    corpus_file: Path, tmp_path: Path, monkeypatch
):
    first = open_data(config(corpus_file), 400, 0, 1, tmp_path / "cache")
    whole = np.concatenate([first.train.tokens, first.validation.tokens])
    assert first.validation.size == int(len(whole) * 0.1)
    assert first.tokenizer.decode(whole) == first.decode(whole.tolist()) == "".join(TEXTS)
    assert first.train.end == 0 and np.count_nonzero(whole == 0) == len(TEXTS)

    monkeypatch.setattr(
        Documents, "__iter__", lambda self: pytest.fail("a cached start reads no text")
    )
    second = open_data(config(corpus_file), 400, 0, 1, tmp_path / "cache")
    assert np.array_equal(second.train.tokens, first.train.tokens)
    assert np.array_equal(second.validation.tokens, first.validation.tokens)
    assert (
        second.tokenizer.to_str() == first.tokenizer.to_str() and second.digest() == first.digest()
    )
    assert (
        open_data(config(corpus_file, 8), 400, 0, 1, tmp_path / "cache").digest() != first.digest()
    )


def test_corpus_errors(corpus_file: Path, cache: Path):
    def load(seq_len: int, fraction: float = 0.02):
        return lambda: open_data(config(corpus_file, seq_len, fraction), 400, 0, 1, cache)

    one_line(load(10**6), "the training text", str(10**6 + 1), "lower --data.seq-len")
    one_line(
        load(512),
        "the validation text",
        "513",
        "lower --data.seq-len",
        "raise --data.validation-ratio, or",
    )
    one_line(load(0), "data.seq_len=0", "at least 1")
    for fraction in (1.0, -0.1, 0.0, float("nan")):
        one_line(load(8, fraction), f"data.validation_ratio={fraction}", "between 0 and 1")


def test_sources_share_a_tokenizer_or_are_refused(corpus_file: Path, tmp_path: Path):
    """The tokenizer is trained on all text, or stands beside prepared files, or is given."""
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "zebras and quaggas graze beside the water"}\n' * 99)
    both = open_data(config(f"1 {corpus_file}, 1 {other}"), 400, 0, 9, tmp_path)
    vocabulary = both.tokenizer.get_vocab()
    assert any("quagga" in word for word in vocabulary) and any(
        "return" in word for word in vocabulary
    )
    assert both.samples is None

    for name, vocab in (("a", 285), ("b", 275)):
        argv = [
            "prepare",
            str(other),
            "--vocab",
            str(vocab),
            "--out",
            str(tmp_path / name),
            "--workers",
            "1",
        ]
        assert main(argv) == 0
    a, b = tmp_path / "a", tmp_path / "b"
    one = open_data(config(f"1 {a}, 1 {corpus_file}"), 400, 0, 9, tmp_path)
    assert one.tokenizer.get_vocab_size() == 285 and one.samples == 9
    unlike = config(f"1 {a}, 1 {b}")
    one_line(
        lambda: open_data(unlike, 400, 0, 9, tmp_path), "different or unknown", "--data.tokenizer"
    )
    beside(a).unlink()
    mixed = config(f"1 {a}, 1 {corpus_file}")
    one_line(
        lambda: open_data(mixed, 400, 0, 9, tmp_path), "different or unknown", "--data.tokenizer"
    )
    assert open_data(config(a), 400, 0, 9, tmp_path).tokenizer is None
    named = config(f"1 {a}, 1 {corpus_file}", tokenizer=str(beside(b)))
    assert open_data(named, 400, 0, 9, tmp_path).tokenizer.get_vocab_size() == 275
    one_line(lambda: open_data(config(beside(b)), 400, 0, 9, tmp_path), "tokenizer.json")


ALONE = """
import sys
sys.modules.update(dict.fromkeys(["tokenizers", "datasets", "pyarrow", "torch", "rich", "jinja2"]))
from dtron.data import Prefetch, Rows, Indexed, Writer
import dtron.data.best_fit_packing
"""


def test_reading_token_files_takes_numpy_alone():
    root = str(ROOT)
    subprocess.run(
        [sys.executable, "-c", ALONE], check=True, env={**os.environ, "PYTHONPATH": root}
    )


SCRIPT = """
import hashlib, socket, sys
socket.getaddrinfo = socket.socket.connect = lambda *_, **__: sys.exit("reached for the network")
from dtron.data import Documents, cache_dir, encode, get_tokenizer
docs = Documents(sys.argv[1])
tokens = encode(docs, get_tokenizer(None, docs, 400, cache_dir()), cache_dir())
print(len(tokens), hashlib.sha256(tokens.tobytes()).hexdigest(), "datasets" in sys.modules)
"""


def test_two_processes_starting_at_once_agree(corpus_file: Path, tmp_path: Path):
    root = str(ROOT)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "DTRON_CACHE": str(tmp_path / "cache"),
        "HOME": str(tmp_path / "home"),  # shows that nothing is written outside the cache
        "PYTHONPATH": root,
    }

    def start() -> subprocess.Popen:
        command = [sys.executable, "-c", SCRIPT, str(corpus_file)]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True
        )

    def finish(process: subprocess.Popen) -> list[str]:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert "Generating" not in err, "a progress bar from datasets"
        return out.split()

    first, second = [finish(process) for process in (start(), start())]
    third = finish(start())
    assert int(first[0]) > 1000 and first[:2] == second[:2] == third[:2]
    assert third[2] == "False", "a cached start must not pay for importing datasets"
    assert not (tmp_path / "home").exists()
    assert not list((tmp_path / "cache").glob("*.tmp"))
