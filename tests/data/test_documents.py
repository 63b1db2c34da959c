"""dtron.data.documents: every kind of file is read, and a broken file is one line."""

import os
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from dtron.data import Documents, open_data
from dtron.data.documents import documents
from dtron.runtime.config import DataConfig
from tests.helpers.texts import TEXTS, corpus, one_line


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


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
    parquet.write_table(
        pa.table({"n": [1, 2, 3], "text": ["seven", None, "eight"]}), folder / "e.parquet"
    )
    (folder / "sub" / "f.text").write_text("nine")
    expected = [
        "one\r\ndocument\n",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
    ]
    assert documents(str(folder), cache=cache)["text"][:] == expected
    assert list(Documents(str(folder), cache=cache)) == expected


def test_the_column_is_chosen_and_changes_the_key(tmp_path: Path, cache: Path):
    file = tmp_path / "a.parquet"
    parquet.write_table(
        pa.table({"text": ["wrong"], "code": pa.array(["right"]).dictionary_encode()}), file
    )
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
    assert (
        {"os.py", "json/decoder.py"} <= set(names) and names == sorted(names) and len(names) > 300
    )
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
    monkeypatch.setattr("dtron.data.documents._library", lambda: tmp_path)
    assert documents(cache=cache)["text"][:] == ["z = 1\n", "b = 1\n"]
    before = Documents(cache=cache).key
    (tmp_path / "b.py").write_bytes(b"b = 2\n")
    assert Documents(cache=cache).key != before


JSONL = [
    (b'{"text": "a"}\n{"text": \n', ["line 2", "malformed JSON", "one object a line"]),
    (b'{"text": "a"}\n\n["text"]\n', ["line 3", "['text']", "must be an object"]),
    (b'{"body": "a", "id": 1}\n', ["line 1", "'text'", "'body', 'id'", "--data.column"]),
    (b'{"text": 17}\n', ["line 1", "int", "'text'", "--data.column"]),
    (b'{"text": "\xff"}\n', ["line 1", "not UTF-8", "iconv"]),
    (b'{"text": "\\ud800"}\n', ["line 1", "ud800", "surrogate"]),
    (b'{"text": "a"}\n' + b"[" * 100_000, ["line 2", "malformed JSON"]),
    (b'{"text": ""}\n', ["no text at all", "--data.path"]),
    (b"", ["no text at all", "--data.path"]),
]


@pytest.mark.parametrize(("data", "parts"), JSONL)
def test_errors_in_json_lines(data: bytes, parts: list[str], tmp_path: Path, cache: Path):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(data)
    one_line(lambda: documents(str(file), cache=cache), str(file), *parts)
    # The same through the cache, as in a run. No half-written cache is left for the next
    # run.
    for _ in range(2):
        d = DataConfig(path=str(file), seq_len=8)
        one_line(lambda d=d: open_data(d, 300, 0, 1, cache), str(file), *parts)


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
def test_errors_in_other_files(
    name: str, data: bytes, parts: list[str], tmp_path: Path, cache: Path
):
    (tmp_path / name).write_bytes(data)
    one_line(lambda: documents(str(tmp_path / name), cache=cache), str(tmp_path / name), *parts)


def test_errors_in_parquet_columns(tmp_path: Path, cache: Path):
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"body": ["a"], "n": [1]}), file)
    one_line(
        lambda: documents(str(file), cache=cache),
        str(file),
        "'text'",
        "'body', 'n'",
        "--data.column",
    )
    one_line(lambda: documents(str(file), "n", cache), str(file), "int64", "'n'", "--data.column")
    data = bytearray(file.read_bytes())
    data[4:40] = b"\xff" * 36  # damages the first page; the footer is read first and stays good
    file.write_bytes(data)
    one_line(lambda: documents(str(file), "body", cache), str(file), "not a readable Parquet file")


def test_errors_about_the_path(tmp_path: Path, cache: Path, monkeypatch):
    missing = str(tmp_path / "no\nsuch")
    one_line(
        lambda: documents(missing, cache=cache), repr(missing), "does not exist", "--data.path"
    )
    one_line(lambda: documents("", cache=cache), "''", "does not exist", "--data.path")
    one_line(lambda: documents(os.devnull, cache=cache), os.devnull, "neither a file nor a folder")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.csv").write_text("text")
    folder = str(tmp_path / "empty")
    one_line(lambda: documents(folder, cache=cache), folder, "without any", ".jsonl", "--data.path")

    # Permissions do not bind root, so the one call that needs them is refused.
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
            lambda: documents(str(locked), cache=cache),
            str(locked),
            "Permission denied",
            "allow this user",
        )
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_bytes", lambda self: self.open("rb").read())
    one_line(
        lambda: documents(str(secret), cache=cache),
        str(secret),
        "Permission denied",
        "allow this user",
    )


@pytest.mark.parametrize("damage", ["empty", "flip", "cut", "pipe", "link"])
def test_a_damaged_cache_of_documents_is_rebuilt(damage: str, tmp_path: Path):
    corpus_file = corpus(tmp_path)
    assert documents(str(corpus_file), cache=tmp_path)["text"][:] == TEXTS
    (arrow,) = tmp_path.rglob("*.arrow")
    good = arrow.read_bytes()
    at = good.index(TEXTS[0].encode())  # a changed letter is still a readable file
    arrow.unlink()
    if damage == "pipe":
        os.mkfifo(arrow)
    elif damage == "link":
        arrow.symlink_to(arrow.name)
    else:
        flipped = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
        arrow.write_bytes({"empty": b"", "flip": flipped, "cut": good[:-1]}[damage])
    assert documents(str(corpus_file), cache=tmp_path)["text"][:] == TEXTS
    assert arrow.read_bytes() == good


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file names")
def test_a_file_name_need_not_be_unicode(tmp_path: Path, cache: Path):
    file = tmp_path / os.fsdecode(b"\xff.txt")
    file.write_text("text")
    assert documents(str(file), cache=cache)["text"][:] == ["text"]
