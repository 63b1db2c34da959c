"""python -m dtron.data: text to indexed files, and a look at them. The reference is megatron-core's
reader and writer where it is installed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from dtron.data import Documents, Indexed, encode, get_tokenizer
from dtron.data import prepare as preparing
from dtron.data.__main__ import main
from dtron.data.open import beside
from dtron.runtime.exit import run_cli
from tests.data.test_indexed import megatron  # noqa: F401  (a fixture)
from tests.helpers.texts import TEXTS, corpus, one_line, words

MORE = [*TEXTS[:40], " \n", "", "x" * 3000, "<|endoftext|> is plain text\n"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepare")
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in MORE), encoding="utf-8"
    )
    get_tokenizer(None, MORE, 300, folder).save(str(folder / "tokenizer.json"))
    return folder


def prepare(*argv: str) -> None:
    assert run_cli(main, ["prepare", *map(str, argv)]) == 0


def refuse(capsys, *argv: str) -> str:
    assert run_cli(main, list(map(str, argv))) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and "--data." not in err
    return err


@pytest.fixture(scope="module")
def prepared(folder) -> Path:
    prepare(
        folder / "a.jsonl",
        "--tokenizer",
        folder / "tokenizer.json",
        "--out",
        folder / "a",
        "--workers",
        1,
    )
    return folder / "a"


def test_what_is_written_is_what_training_on_the_text_would_see(folder, prepared, tmp_path):
    docs = Documents(str(folder / "a.jsonl"), "text", tmp_path)
    tokenizer = get_tokenizer(str(folder / "tokenizer.json"), docs, 300, tmp_path)
    read = Indexed(prepared)
    assert np.array_equal(read.tokens, encode(docs, tokenizer, tmp_path))
    decoded = [tokenizer.decode(read.sequence(i).tolist()) for i in range(len(read))]
    assert decoded == [text for text in MORE if text.strip()]
    assert np.array_equal(read.documents, np.arange(len(read) + 1)) and read.dtype == "<u2"
    assert beside(prepared).read_text() == tokenizer.to_str(pretty=True)


def test_workers_and_blocks_change_nothing(folder, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "BLOCK", 500)
    prepare(folder / "a.jsonl", "--tokenizer", folder, "--out", tmp_path / "b", "--workers", 3)
    for suffix in (".bin", ".idx", ".tokenizer.json"):
        assert (tmp_path / f"b{suffix}").read_bytes() == Path(f"{prepared}{suffix}").read_bytes()
    assert len(list(tmp_path.iterdir())) == 3


def test_every_format_and_folders_of_them(folder, prepared, tmp_path):
    rows = tmp_path / "rows"
    rows.mkdir()
    table = pa.table({"text": MORE[:20]})
    parquet.write_table(table, rows / "a.parquet")
    with ipc.new_stream(rows / "b.arrow", table.schema) as out:
        out.write_table(pa.table({"text": MORE[20:30]}))
    with ipc.new_file(rows / "c.arrow", table.schema) as out:
        out.write_table(pa.table({"text": MORE[30:]}))
    (rows / "state.json").write_text('{"what datasets": "writes beside"}')
    prepare(rows, "--tokenizer", folder / "tokenizer.json", "--out", tmp_path / "b", "--workers", 1)
    assert (tmp_path / "b.bin").read_bytes() == Path(f"{prepared}.bin").read_bytes()
    assert (tmp_path / "b.idx").read_bytes() == Path(f"{prepared}.idx").read_bytes()


def test_without_a_tokenizer_one_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DTRON_CACHE", str(tmp_path / "cache"))
    prepare(corpus(tmp_path), "--vocab", 280, "--out", tmp_path / "c", "--workers", 1)
    assert "200 documents" in capsys.readouterr().out
    assert run_cli(main, ["info", str(tmp_path / "c.idx")]) == 0
    out = capsys.readouterr().out
    for part in (
        "documents             200",
        "sequences             200",
        "of type u16",
        "280 words",
        "def f0(x)",
    ):
        assert part in out, out
    assert Indexed(tmp_path / "c").tokens.max() < 280


def test_info_of_documents_of_several_sequences(tmp_path, capsys):
    from dtron.data import Writer

    with Writer(tmp_path / "c", "<i4") as out:
        out.document(np.array([7, 8, 9]), [1, 2])
        out.document(np.array([], int), [])
        out.document(np.array([70000]))
    assert run_cli(main, ["info", str(tmp_path / "c")]) == 0
    out = capsys.readouterr().out
    for part in (
        "documents             3",
        "sequences             3",
        "4 of type i32",
        "1 in the middle",
        "3 at most",
    ):
        assert part in out, out
    assert "7 to 70000" in out


def test_bad_input_is_one_line_and_leaves_nothing(folder, prepared, tmp_path, capsys):
    good = ["--tokenizer", folder / "tokenizer.json", "--workers", 1]
    bad = tmp_path / "bad.jsonl"
    out = ["--out", tmp_path / "out"]
    for content, parts in {
        b'{"text": "a"}\n{"text": ': ("line 2", "malformed JSON"),
        b'{"text": "a"}\n\n{"body": "a"}': ("line 3", "no column 'text'", "--column"),
        b'{"text": 3}': ("line 1", "int"),
        b'{"text": "\xff"}': ("not UTF-8",),
        b'{"text": " "}': ("holds no text at all",),
        b"": ("holds no text at all",),
    }.items():
        bad.write_bytes(content)
        said = refuse(capsys, "prepare", bad, *good, *out)
        assert all(part in said for part in (*parts, "bad.jsonl")), said
    before = Path(f"{prepared}.bin").read_bytes()
    assert "a.bin' exists" in refuse(
        capsys, "prepare", folder / "a.jsonl", *good, "--out", prepared
    )
    assert Path(f"{prepared}.bin").read_bytes() == before
    assert "no.jsonl' does not exist" in refuse(
        capsys, "prepare", tmp_path / "no.jsonl", *good, *out
    )
    said = refuse(capsys, "prepare", folder / "a.jsonl", "--tokenizer", tmp_path / "no.json", *out)
    assert said.startswith("error: --tokenizer") and "does not exist" in said
    few = words({"?": 0, "x": 1}, tmp_path / "few.json")
    said = refuse(capsys, "prepare", folder / "a.jsonl", "--tokenizer", few, *out)
    assert "few.json" in said and "no file beside it names" in said and "--end-token" in said
    few = words({"?": 0, "</s>": 1}, tmp_path / "few.json")
    prepare(
        folder / "a.jsonl", "--tokenizer", few, *out, "--workers", 1
    )  # that tokenizer encodes unknown words as one token
    assert "--workers 0" in refuse(capsys, "prepare", bad, *good[:2], *out, "--workers", 0)
    assert "--out" in refuse(capsys, "prepare", folder / "a.jsonl", *good)
    assert "no.idx" in refuse(capsys, "info", tmp_path / "no")
    names = {"bad.jsonl", "few.json", "out.bin", "out.idx", "out.tokenizer.json"}
    assert {file.name for file in tmp_path.iterdir()} == names


def test_an_id_above_the_tokenizers_vocabulary_is_seen(folder, prepared, tmp_path, capsys):
    for suffix in (".bin", ".idx", ".tokenizer.json"):
        shutil.copy(f"{prepared}{suffix}", tmp_path / f"c{suffix}")
    with (tmp_path / "c.bin").open("r+b") as file:
        file.write(b"\xff\x7f")
    assert "token id 32767" in refuse(capsys, "info", tmp_path / "c")


def test_a_worker_that_is_killed(folder, tmp_path, monkeypatch):
    class Pool:
        def __init__(self, *_):
            pass

        def submit(self, *_):
            raise preparing.BrokenProcessPool("killed")

        def shutdown(self, **_):
            pass

    monkeypatch.setattr(preparing, "ProcessPoolExecutor", Pool)
    tokenizer = get_tokenizer(str(folder / "tokenizer.json"), [], 300, tmp_path)
    one_line(
        lambda: preparing.prepare([folder / "a.jsonl"], tokenizer, str(tmp_path / "c")),
        "--workers",
        "use fewer",
    )
    assert not list(tmp_path.iterdir())


def test_files_are_megatrons_byte_for_byte_both_ways(megatron, prepared, tmp_path):  # noqa: F811
    _, indexed, _ = megatron
    ours, theirs = Indexed(prepared), indexed.IndexedDataset(str(prepared))
    assert len(ours) == len(theirs) and ours.dtype == theirs.index.dtype
    assert np.array_equal(ours.documents, theirs.document_indices)
    assert all(np.array_equal(ours.sequence(i), theirs[i]) for i in range(len(ours)))

    import torch

    for vocab, dtype in ((300, np.uint16), (70000, np.int32)):
        assert indexed.DType.optimal_dtype(vocab) is dtype
        builder = indexed.IndexedDatasetBuilder(str(tmp_path / "t.bin"), dtype)
        for i in range(len(ours)):
            builder.add_item(torch.from_numpy(ours.sequence(i).astype(np.int64)))
            if i % 2:  # documents of two sequences
                builder.end_document()
        builder.end_document()
        builder.finalize(str(tmp_path / "t.idx"))
        read = Indexed(tmp_path / "t")
        assert np.array_equal(read.tokens, ours.tokens) and np.array_equal(
            read.lengths, ours.lengths
        )
        with preparing.Writer(tmp_path / "o", preparing.token_dtype(vocab), overwrite=True) as out:
            for a, b in zip(read.documents[:-1], read.documents[1:], strict=True):
                parts = [read.sequence(i) for i in range(a, b)]
                out.document(
                    np.concatenate([[], *parts]).astype(np.int64), [len(part) for part in parts]
                )
        for suffix in (".bin", ".idx"):
            assert (tmp_path / f"o{suffix}").read_bytes() == (tmp_path / f"t{suffix}").read_bytes()


@pytest.mark.parametrize("path", ["", ".", "/", "..", "~nobody-of-this-name/a"])
def test_a_name_that_no_pair_of_files_has_is_one_line(path):
    one_line(lambda: main(["info", path]), repr(path))
    one_line(lambda: main(["prepare", "a.jsonl", "--out", path]), path)
