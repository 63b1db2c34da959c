"""The files of a folder are read, or named with the reason. Compressed files; errors with lines."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from dtron.data import Documents, files, formats, get_tokenizer, open_data
from dtron.data.documents import documents
from dtron.data.files import find_files
from dtron.data.indexed import Indexed
from dtron.data.prepare import _blocks, prepare
from dtron.errors import UserError
from dtron.runtime.config import DataConfig
from tests.helpers.texts import TEXTS, one_line


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def zst(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


def texts_at(path: Path, cache: Path) -> list[str]:
    return list(Documents(str(path), cache=cache, streaming=True))


PACKED = {
    "a.jsonl.gz": gzip.compress(lines("one")) + gzip.compress(lines("two")),  # two members
    "b.jsonl.zst": zst(lines("three")) + zst(lines("four")),
    "c.txt.gz": gzip.compress(b"\xef\xbb\xbffive"),
    "d.JSON.ZST": zst(json.dumps([{"text": "six"}]).encode()),
}


def test_compressed_files_are_read(tmp_path):
    for name, data in PACKED.items():
        (tmp_path / name).write_bytes(data)
    want = ["one", "two", "three", "four", "five", "six"]
    assert texts_at(tmp_path, tmp_path / "cache") == want
    assert texts_at(tmp_path / "b.jsonl.zst", tmp_path / "cache") == want[2:4]


def test_prepare_reads_them_too(tmp_path):
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    for folder in (plain, packed):
        folder.mkdir()
    (plain / "a.jsonl").write_bytes(lines(*TEXTS))
    (packed / "a.jsonl.gz").write_bytes(gzip.compress(lines(*TEXTS)))
    tokenizer: Tokenizer = get_tokenizer(
        None, Documents(str(plain), cache=tmp_path / "c"), 300, tmp_path / "c"
    )
    seen: list[int] = []
    for folder in (plain, packed):
        found = find_files(str(folder)).files
        prepare(
            found, tokenizer, str(folder / "out"), workers=1, progress=lambda n, _: seen.append(n)
        )
        assert seen[-1] == found[0].stat().st_size  # the bar ends at its end
    assert (plain / "out.bin").read_bytes() == (packed / "out.bin").read_bytes()
    assert len(Indexed(plain / "out").lengths) == len(TEXTS)


@pytest.mark.parametrize("name", PACKED)
def test_damage_is_one_line(tmp_path, name):
    for data in (PACKED[name][:-5], b"no such file at all"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=rf"{name}' is damaged or no .* file"):
            texts_at(tmp_path / name, tmp_path / "cache")


def test_everything_in_a_folder_is_read_or_named(tmp_path):
    root, elsewhere = tmp_path / "web", tmp_path / "elsewhere"
    (root / "more").mkdir(parents=True)
    (root / ".git").mkdir()
    elsewhere.mkdir()
    (elsewhere / "far.txt").write_text("far")
    (root / "near.txt").write_text("near")
    (root / ".git" / "hidden.txt").write_text("hidden")
    (root / "table.csv").write_text("a,b")
    (root / "rows.parquet.gz").write_bytes(b"")
    (root / "dataset_infos.json").write_text("{}")
    os.symlink(elsewhere, root / "linked")
    os.symlink(root, root / "more" / "again")
    os.symlink(root / "nothing", root / "broken.txt")
    found = find_files(str(root))
    assert [file.name for file in found.files] == ["far.txt", "near.txt"]
    named = {str(file.relative_to(root)): why for file, why in found.skipped}
    assert named == {
        "broken.txt": "a broken link",
        "dataset_infos.json": "it describes a data set",
        "more/again": "a link to a folder that is read already",
        "rows.parquet.gz": "the suffix '.parquet.gz', which has no reader: unpack it",
        "table.csv": "the suffix '.csv', which has no reader",
    }
    line = found.skipped_line(str(root), most=1)
    assert line == f"skipped in {root}: broken.txt (a broken link) and 4 more"
    assert find_files(str(elsewhere)).skipped_line(str(elsewhere)) is None


def test_a_run_says_what_is_skipped(tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.jsonl").write_bytes(lines(*TEXTS * 20))
    (tmp_path / "web" / "b.csv").write_text("a,b")
    web = str(tmp_path / "web")
    data = open_data(DataConfig(path=web, seq_len=8), 300, 0, 8, tmp_path / "cache")
    assert data.notes == (find_files(web).skipped_line(web),)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_every_kind_of_string_is_text(tmp_path, kind):
    column = pa.array(["one", None, "two"], kind)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink:
        table = pa.table({"text": column})
        with pa.ipc.new_file(sink, table.schema) as out:
            out.write_table(table)
    pq.write_table(pa.table({"text": column.cast(pa.large_string())}), tmp_path / "b.parquet")
    assert texts_at(tmp_path, tmp_path / "cache") == ["one", "two"] * 2


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", lines("one") + b'{"text": "\xff"}\n', r"a.jsonl' line 2 is not UTF-8 text"),
        ("a.txt", b"one\ntwo\n\xe9", r"a.txt' line 3 is not UTF-8 text"),
        ("a.json", b'[{"text": "x"},\n{"text": "\xe9"}]', r"a.json' line 2 is not UTF-8 text"),
        (
            "a.jsonl.gz",
            gzip.compress(lines("one") + b"\xff\n", mtime=0),
            r"line 2 is not UTF-8 text",
        ),
        ("b.jsonl", lines("one", "a \ud800 b"), r"b.jsonl' line 2 has \\ud800, half of a surrog"),
        ("b.json", json.dumps([{"text": "\udc00"}]).encode(), r"b.json' row 1 has \\udc00, half"),
    ],
)
def test_errors_of_encoding_name_the_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        texts_at(tmp_path / name, tmp_path / "cache")


def test_numbers_are_no_text(tmp_path):
    pq.write_table(pa.table({"text": np.arange(3)}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="holds int64 in the column 'text'"):
        texts_at(tmp_path, tmp_path / "cache")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_line_without_end_is_one_line(name, tmp_path, monkeypatch):
    """A file of zeros is one line, which would take all memory."""
    monkeypatch.setattr(formats, "LONGEST_LINE", 1000)
    rows = (json.dumps({"text": "a" * size}) + "\n" for size in (10, 2000))
    content = "".join(rows).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    found = formats.texts(tmp_path / name, "text")
    assert next(found) == "a" * 10
    one_line(lambda: next(found), name, "a line of more than 1000 bytes")


@pytest.mark.parametrize("offsets", [(0, 3, 2**30), (0, -5, 7), (9, 3, 1), (-(2**31), 3, 7)])
def test_a_damaged_arrow_file_is_one_line(offsets, tmp_path):
    """pyarrow does not look at the places of the words in an .arrow file before it reads there."""
    file = tmp_path / "a.arrow"
    with pa.ipc.new_stream(file, pa.schema([("text", pa.string())])) as stream:
        stream.write(pa.table({"text": ["abc", "defg"]}))
    data = file.read_bytes()
    assert struct.pack("<3i", 0, 3, 7) in data
    file.write_bytes(data.replace(struct.pack("<3i", 0, 3, 7), struct.pack("<3i", *offsets)))
    one_line(lambda: texts_at(file, tmp_path), repr(str(file)), "not a readable Arrow file")


def test_two_columns_of_one_name_are_one_line(tmp_path):
    table = pa.table([["a"], ["b"]], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(tmp_path / "b.arrow", table.schema) as stream:
        stream.write(table)
    for name in ("a.parquet", "b.arrow"):
        one_line(lambda n=name: texts_at(tmp_path / n, tmp_path), name, "several columns 'text'")


def bombs(word: str) -> dict[str, bytes]:
    """Files of one word, many times, by name."""
    dictionary = pa.array([word] * 1000).dictionary_encode()
    out = {"a.jsonl.gz": gzip.compress(lines(*[word] * 1000))}
    out["a.txt.zst"] = zst(word.encode() * 1000)
    for name, column in (("plain", pa.array([word] * 1000)), ("dictionary", dictionary)):
        table = pa.table({"text": column})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        out[f"{name}.parquet"] = sink.getvalue().to_pybytes()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as stream:
            stream.write_table(table)
        out[f"{name}.arrow"] = sink.getvalue().to_pybytes()
    return out


@pytest.mark.parametrize("name", bombs("word"))
def test_a_file_that_expands_without_end_is_one_line(name, tmp_path, monkeypatch):
    """A few kilobytes would fill the disk of the cache."""
    file = tmp_path / name
    file.write_bytes(bombs("word" * 100)[name])
    assert len("".join(texts_at(file, tmp_path))) == 400_000  # harmless
    monkeypatch.setattr(files, "HARMLESS", 100_000)
    monkeypatch.setattr(files, "MOST_GROWTH", 0.5 if name == "plain.arrow" else 5)
    for read in (
        lambda: texts_at(file, tmp_path),
        lambda: documents(str(file), cache=tmp_path),
        lambda: list(_blocks([file], "text")),
    ):
        one_line(read, repr(str(file)), "and expands to more than", "leave it out of")


def test_a_text_without_room_is_one_line(tmp_path, monkeypatch):
    """A .parquet file says how large its columns are, so the rest of the text is not written."""
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["word " * 1000], "other": ["?" * 9000]}), file)
    room = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room._replace(free=4000))
    cache = tmp_path / "cache"
    one_line(
        lambda: documents(str(file), cache=cache),
        "--data.path",
        "takes",
        "GB free",
        "DTRON_CACHE",
        "--data.streaming",
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room._replace(free=9000))
    assert len(documents(str(file), cache=cache)) == 1
