"""dtron.data: exact resume, lossless tokens, a cache that can be trusted, and errors that say what to do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers

from dtron.data import (
    Documents,
    cache_dir,
    document_ids,
    documents,
    encode,
    end_id,
    get_tokenizer,
    load_corpus,
    rows,
    text,
    tokens,
)
from dtron.data.cache import cached, digest

TEXTS = [f"def f{i}(x):\n    return x + {i}  # naïve 😀\n" for i in range(200)]


def one_line(call, *parts: str) -> None:
    """The call fails with a plain ValueError whose message is one line and holds every part."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is ValueError, repr(caught.value)
    assert "\n" not in message and len(message) < 500
    for part in parts:
        assert part in message, f"{part!r} is not in: {message}"


def words(vocab: dict[str, int], path: Path) -> str:
    """A user's tokenizer.json: whole words, nothing else."""
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=next(iter(vocab))))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tokenizer(cache: Path) -> Tokenizer:
    return get_tokenizer(None, TEXTS, 400, cache)


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS), encoding="utf-8")
    return file


# ------------------------------------------------------------------------------------------------- rows

LENGTHS = st.integers(1, 9).flatmap(lambda s: st.tuples(st.just(s), st.integers(s + 1, 90)))


@given(
    LENGTHS,
    st.integers(0, 2**40),
    st.integers(0, 200),
    st.lists(st.integers(0, 20), max_size=5),
    st.booleans(),
)
def test_a_range_is_the_concatenation_of_its_pieces(lengths, seed, start, counts, shuffle):
    sequence, length = lengths
    data = np.arange(length, dtype=np.uint16)
    whole = rows(data, sequence, seed, start, sum(counts), shuffle)
    starts = start + np.cumsum([0, *counts])
    pieces = [rows(data, sequence, seed, int(s), c, shuffle) for s, c in zip(starts, counts, strict=False)]
    assert whole.dtype == np.int64 and whole.shape == (sum(counts), sequence + 1)
    assert np.array_equal(whole, np.concatenate([whole[:0], *pieces]))


@given(LENGTHS, st.integers(0, 2**40), st.integers(0, 3))
def test_an_epoch_takes_every_chunk_once(lengths, seed, epoch):
    sequence, length = lengths
    chunks = (length - 1) // sequence
    taken = rows(np.arange(length), sequence, seed, epoch * chunks, chunks)
    assert sorted(taken[:, 0]) == [chunk * sequence for chunk in range(chunks)]
    # Targets are inputs shifted by one, and the last target is the first input of the next chunk.
    assert np.array_equal(taken[:, 1:], taken[:, :-1] + 1)
    assert sorted(taken[:, 1:].ravel()) == list(range(1, chunks * sequence + 1))


def test_epochs_and_seeds_have_their_own_order():
    data = np.arange(201)
    first, second = rows(data, 2, 0, 0, 100), rows(data, 2, 0, 100, 100)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, rows(data, 2, 1, 0, 100))
    assert np.array_equal(rows(data, 2, 0, 0, 100, shuffle=False)[:, 0], np.arange(0, 200, 2))
    assert np.array_equal(rows(data, 2, 0, 100, 100, shuffle=False)[:, 0], np.arange(0, 200, 2))


def test_the_order_is_a_fixed_one():
    """A checkpoint stores only the position: another order here would make old runs resume wrongly."""
    assert rows(np.arange(17), 2, 7, 0, 16)[:, 0].tolist() == [
        14,
        8,
        12,
        2,
        10,
        0,
        4,
        6,
        14,
        8,
        6,
        0,
        2,
        10,
        4,
        12,
    ]


def test_rows_rejects_what_it_cannot_serve():
    one_line(lambda: rows(np.arange(8), 8, 0, 0, 1), "8 tokens", "9", "--data.sequence")
    one_line(lambda: rows(np.arange(8), 0, 0, 0, 1), "--data.sequence 0", "1 or more")
    one_line(lambda: rows(np.arange(8), 2, 0, -1, 1), "start -1", "count from 0")


# ----------------------------------------------------------------------------------------- document_ids


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


# ---------------------------------------------------------------------------------------------- reading


def test_every_kind_of_file_is_read_in_order(tmp_path: Path, cache: Path):
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.txt").write_text("hidden")
    (folder / "README.md").write_text("not read")
    (folder / "a.txt").write_bytes(b"one\r\ndocument\n")
    (folder / "b.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "two"}\n\n{"text": null}\n{"text": " "}\n{"text": "three"}'
    )
    (folder / "c.JSON").write_text('\n[{"text": "four"},\n {"text": "five"}]')
    (folder / "d.json").write_text('{"text": "six"}\n')
    parquet.write_table(pa.table({"n": [1, 2, 3], "text": ["seven", None, "eight"]}), folder / "e.parquet")
    (folder / "sub" / "f.text").write_text("nine")
    expected = ["one\r\ndocument\n", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert documents(str(folder), cache=cache)["text"][:] == expected
    assert list(Documents(str(folder), cache=cache)) == expected


def test_the_column_is_chosen_and_changes_the_key(tmp_path: Path, cache: Path):
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["wrong"], "code": pa.array(["right"]).dictionary_encode()}), file)
    assert documents(str(file), "code", cache)["text"][:] == ["right"]
    assert Documents(str(file), "code", cache).key != Documents(str(file), "text", cache).key


def test_a_changed_file_changes_the_key(tmp_path: Path, cache: Path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    os.utime(file, ns=(1, 1))
    before = Documents(str(file), cache=cache).key
    assert Documents(str(file), cache=cache).key == before
    file.write_text("two")
    os.utime(file, ns=(2, 2))
    assert Documents(str(file), cache=cache).key != before
    assert documents(str(file), cache=cache)["text"][:] == ["two"]


def test_the_default_corpus_is_the_library_without_tests(tmp_path: Path, cache: Path, monkeypatch):
    library = Path(os.__file__).parent
    names = [file.relative_to(library).as_posix() for file in Documents(cache=cache).files]
    assert {"os.py", "json/decoder.py"} <= set(names) and names == sorted(names) and len(names) > 300
    assert not any("test" in Path(name).parts or "site-packages" in name for name in names)

    for name, data in {
        "b.py": b"b = 1\n",
        "a/z.py": b"z = 1\n",
        "a/latin.py": b"# coding: latin-1\n# \xe9\n",
        "test/t.py": b"t = 1\n",
        "site-packages/s.py": b"s = 1\n",
        "empty.py": b"",
        "note.txt": b"text",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    monkeypatch.setattr(text, "_library", lambda: tmp_path)
    assert documents(cache=cache)["text"][:] == ["z = 1\n", "b = 1\n"]
    before = Documents(cache=cache).key
    (tmp_path / "b.py").write_bytes(b"b = 2\n")
    assert Documents(cache=cache).key != before


JSONL = [
    (b'{"text": "a"}\n{"text": \n', ["line 2", "malformed JSON", "one object a line"]),
    (b'{"text": "a"}\n\n["text"]\n', ["line 3", "['text']", "must be an object"]),
    (b'{"body": "a", "id": 1}\n', ["line 1", "'text'", "'body', 'id'", "--data.column"]),
    (b'{"text": 17}\n', ["line 1", "int", "'text'", "--data.column"]),
    (b'{"text": "\xff"}\n', ["not UTF-8", "iconv"]),
    (b'{"text": "\\ud800"}\n', ["not UTF-8", "iconv"]),
    (b'{"text": "a"}\n' + b"[" * 100_000, ["line 2", "malformed JSON"]),
    (b'{"text": ""}\n', ["no text at all", "--data.path"]),
    (b"", ["no text at all", "--data.path"]),
]


@pytest.mark.parametrize(("data", "parts"), JSONL)
def test_errors_in_json_lines(data: bytes, parts: list[str], tmp_path: Path, cache: Path):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(data)
    one_line(lambda: documents(str(file), cache=cache), str(file), *parts)
    # The same through the cache, as a run meets it; nothing half-made is left to be found next time.
    for _ in range(2):
        one_line(lambda: load_corpus(str(file), "text", None, 300, 8, cache=cache), str(file), *parts)


@pytest.mark.parametrize(
    ("name", "data", "parts"),
    [
        ("a.json", b'[{"text": "a"}, {"text": ]', ["malformed JSON", ".json"]),
        ("a.json", b'[{"text": "a"}, 3]', ["row 2", "'3'", "must be an object"]),
        ("a.txt", b"caf\xe9", ["not UTF-8", "0xe9", "iconv"]),
        ("a.txt", b" \n", ["no text at all", "--data.path"]),
        ("a.parquet", b"PAR1 but not really", ["not a readable Parquet file", "write it again"]),
        ("a.parquet", b"", ["not a readable Parquet file", "write it again"]),
        ("a.csv", b"text\na\n", ["'.csv'", ".parquet", "--data.path"]),
        ("plain", b"text", ["''", ".parquet", "--data.path"]),
    ],
)
def test_errors_in_other_files(name: str, data: bytes, parts: list[str], tmp_path: Path, cache: Path):
    (tmp_path / name).write_bytes(data)
    one_line(lambda: documents(str(tmp_path / name), cache=cache), str(tmp_path / name), *parts)


def test_errors_in_parquet_columns(tmp_path: Path, cache: Path):
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"body": ["a"], "n": [1]}), file)
    one_line(lambda: documents(str(file), cache=cache), str(file), "'text'", "'body', 'n'", "--data.column")
    one_line(lambda: documents(str(file), "n", cache), str(file), "int64", "'n'", "--data.column")
    data = bytearray(file.read_bytes())
    data[4:40] = b"\xff" * 36  # the first page; the footer, which is read first, stays good
    file.write_bytes(data)
    one_line(lambda: documents(str(file), "body", cache), str(file), "not a readable Parquet file")


def test_errors_about_the_path(tmp_path: Path, cache: Path, monkeypatch):
    missing = str(tmp_path / "no\nsuch")
    one_line(lambda: documents(missing, cache=cache), repr(missing), "does not exist", "--data.path")
    one_line(lambda: documents("", cache=cache), "''", "does not exist", "--data.path")
    one_line(lambda: documents(os.devnull, cache=cache), os.devnull, "neither a file nor a folder")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.csv").write_text("text")
    folder = str(tmp_path / "empty")
    one_line(lambda: documents(folder, cache=cache), folder, "without any", ".jsonl", "--data.path")

    # Permissions do not bind root, so refuse the one call that would meet them.
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    real = Path.open

    def refuse(self: Path, *args, **kwargs):
        if self == secret:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    locked = tmp_path / "locked"
    locked.mkdir()
    scan = os.scandir

    def refuse_folder(path):
        if Path(path) == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse_folder)
        one_line(
            lambda: documents(str(locked), cache=cache), str(locked), "Permission denied", "allow this user"
        )
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_bytes", lambda self: self.open("rb").read())
    one_line(lambda: documents(str(secret), cache=cache), str(secret), "Permission denied", "allow this user")


# ------------------------------------------------------------------------------------------- tokenizers


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
def test_long_documents_are_encoded_in_pieces(tokenizer: Tokenizer, tmp_path_factory, docs: list[str]):
    # A cache of its own: the size of a piece is a constant, so it is not part of a key.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "_PIECE", 7)
        patch.setattr(tokens, "_BATCH", 20)
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
    plain.enable_truncation(2)  # a saved tokenizer may carry these, and they would lose or add tokens
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
    gaps = words({"?": 0, "a": 9}, tmp_path / "gaps.json")  # two tokens, but an embedding needs ten rows
    one_line(load(gaps, 9), "10 tokens", "--model.vocab 10")
    one_line(lambda: get_tokenizer(None, TEXTS, 256, cache), "--model.vocab 256", "--model.vocab 257")
    narrow = Tokenizer(models.WordLevel({"a": 0}, unk_token="?"))
    one_line(lambda: encode(["b"], narrow, cache), "--data.tokenizer", "unknown token")


# ------------------------------------------------------------------------------------- cache and corpus


def test_a_corpus_is_split_and_comes_back_from_the_cache(corpus_file: Path, tmp_path: Path, monkeypatch):
    first = load_corpus(str(corpus_file), "text", None, 400, 16, 0.1, tmp_path / "cache")
    whole = np.concatenate([first.train, first.validation])
    assert len(first.validation) == int(len(whole) * 0.1)
    assert first.tokenizer.decode(whole) == "".join(TEXTS)
    assert first.end_id == 0 and np.count_nonzero(whole == 0) == len(TEXTS)

    monkeypatch.setattr(Documents, "__iter__", lambda self: pytest.fail("a cached start reads no text"))
    second = load_corpus(str(corpus_file), "text", None, 400, 16, 0.1, tmp_path / "cache")
    assert np.array_equal(second.train, first.train) and np.array_equal(second.validation, first.validation)
    assert second.tokenizer.to_str() == first.tokenizer.to_str()
    assert len(load_corpus(str(corpus_file), "text", None, 400, 16, 0.0, tmp_path / "cache").train) == len(
        whole
    )


def test_corpus_errors(corpus_file: Path, cache: Path):
    def load(sequence: int, fraction: float = 0.02):
        return lambda: load_corpus(str(corpus_file), "text", None, 400, sequence, fraction, cache)

    one_line(load(10**6), "the training text", str(10**6 + 1), "lower --data.sequence")
    one_line(load(512), "the validation text", "513", "lower --data.sequence", "--data.validation_fraction")
    one_line(load(0), "--data.sequence 0", "1 or more")
    for fraction in (1.0, -0.1, float("nan")):
        one_line(load(8, fraction), f"--data.validation_fraction {fraction}", "[0, 1)", "0.02")


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "short"])
@pytest.mark.parametrize("which", ["tokens-*.uint16", "tokenizer-*.json"])
def test_a_damaged_cache_is_rebuilt(which: str, damage: str, tmp_path: Path):
    def start() -> np.ndarray:
        return encode(TEXTS, get_tokenizer(None, TEXTS, 400, tmp_path), tmp_path)

    before = np.array(start())  # a copy: the file under the memory map is about to change
    (file,) = tmp_path.glob(which)
    good = file.read_bytes()
    flipped = bytes([good[0] ^ 1]) + good[1:]
    file.write_bytes({"cut": good[:-2], "flip": flipped, "empty": b"", "short": good[:3]}[damage])
    assert np.array_equal(start(), before)
    assert file.read_bytes() == good


def test_a_damaged_dataset_cache_is_rebuilt(corpus_file: Path, tmp_path: Path):
    assert documents(str(corpus_file), cache=tmp_path)["text"][:] == TEXTS
    (arrow,) = tmp_path.rglob("*.arrow")
    arrow.write_bytes(b"")
    assert documents(str(corpus_file), cache=tmp_path)["text"][:] == TEXTS


def test_a_cache_entry_is_never_visible_half_written(tmp_path: Path):
    target = tmp_path / "entry"

    def read(file: Path) -> bytes | None:
        return file.read_bytes() if file.exists() else None

    def fail(file: Path) -> None:
        file.write_bytes(b"half")
        assert read(target) is None
        raise KeyError("stopped")

    with pytest.raises(KeyError):
        cached(target, read, fail)
    assert {file.name for file in tmp_path.iterdir()} <= {"entry.lock"}
    assert cached(target, read, lambda file: file.write_bytes(b"whole")) == b"whole"
    assert cached(target, read, fail) == b"whole"
    answers = iter([None, b"theirs"])  # another process built it while this one waited for the lock
    assert cached(target, lambda file: next(answers), fail) == b"theirs"


def test_the_cache_folder(tmp_path: Path, corpus_file: Path, monkeypatch):
    monkeypatch.setenv("DTRON_CACHE", str(tmp_path / "elsewhere"))
    assert cache_dir() == tmp_path / "elsewhere"
    monkeypatch.delenv("DTRON_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "dtron"
    inside_a_file = corpus_file / "cache"
    one_line(lambda: get_tokenizer(None, TEXTS, 400, inside_a_file), str(inside_a_file), "DTRON_CACHE")
    one_line(lambda: documents(str(corpus_file), cache=inside_a_file), str(inside_a_file), "DTRON_CACHE")

    def full(**_):
        raise OSError(28, "No space left on device")
        yield

    monkeypatch.setattr(text, "_rows", full)
    one_line(lambda: documents(str(corpus_file), cache=tmp_path / "c"), "No space left", "DTRON_CACHE")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file names")
def test_a_file_name_need_not_be_unicode(tmp_path: Path, cache: Path):
    file = tmp_path / os.fsdecode(b"\xff.txt")
    file.write_text("text")
    assert documents(str(file), cache=cache)["text"][:] == ["text"]


def test_a_digest_keeps_its_parts_apart():
    assert digest(["ab", "c"]) == digest([b"ab", "c"])
    assert len({digest(parts) for parts in (["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], [])}) == 5


SCRIPT = """
import hashlib, socket, sys
socket.getaddrinfo = socket.socket.connect = lambda *_, **__: sys.exit("reached for the network")
from dtron.data import load_corpus
corpus = load_corpus(sys.argv[1], "text", None, 400, 16)
print(len(corpus.train), hashlib.sha256(corpus.train.tobytes()).hexdigest(), "datasets" in sys.modules)
"""


def test_two_processes_starting_at_once_agree(corpus_file: Path, tmp_path: Path):
    root = str(Path(__file__).parents[1])
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "DTRON_CACHE": str(tmp_path / "cache"),
        "HOME": str(tmp_path / "home"),  # to see that nothing is written outside our cache
        "PYTHONPATH": root,
    }

    def start() -> subprocess.Popen:
        command = [sys.executable, "-c", SCRIPT, str(corpus_file)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)

    def finish(process: subprocess.Popen) -> list[str]:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert "Generating" not in err, "a progress bar from datasets"
        return out.split()

    first, second = [finish(process) for process in (start(), start())]
    third = finish(start())
    assert int(first[0]) > 1000 and first[:2] == second[:2] == third[:2]
    assert third[2] == "False", "a cached start must not pay for importing datasets"
    assert not (tmp_path / "home").exists()
    assert not list((tmp_path / "cache").glob("*.tmp"))
