"""Headers of safetensors files that no program should have written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from dtron.checkpoint.safetensors import STORED, TensorReader, header
from dtron.checkpoint.safetensors_writer import write_file
from tests.helpers.texts import one_line

library = pytest.importorskip("safetensors.torch")


def written(path: Path, text: str, size: int = 64) -> Path:
    data = text.encode()
    path.write_bytes(len(data).to_bytes(8, "little") + data + bytes(size))
    return path


def row(begin: int, end: int, shape=(4,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps({"a": row(0, 16), "b": row(8, 24)}), "b begins at byte"),
        (json.dumps({"a": row(0, 16), "b": row(0, 16)}), "inside another tensor"),
        (json.dumps({"a": row(0, 16), "b": row(16, 32)}).replace('"b"', '"a"'), "safetensors"),
        (json.dumps({"a": row(0, 1 << 70)}), "safetensors"),
        (json.dumps({"a": row(0, 16, (True, 4))}), "safetensors"),
        (json.dumps({"a": row(0, 16, (2, 4))}), "16 bytes"),
        (json.dumps({"a": row(0, 160, (40,))}), "cut short"),
        ("[" * 100_000, "safetensors"),
        ("[]", "safetensors"),
        ("", "safetensors"),
    ],
)
def test_a_wrong_header_is_one_line(tmp_path, text, said):
    path = written(tmp_path / "x.safetensors", text)
    one_line(lambda: header(path), str(path), said)


def test_only_regular_files_are_read(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, tmp_path, tmp_path / "none", Path("/dev/zero")):
        one_line(lambda path=path: header(path), str(path), "cannot be read")
    real = written(tmp_path / "real", json.dumps({"a": row(0, 16)}))
    link = tmp_path / "link"
    link.symlink_to(real)
    assert header(link)["a"].shape == (4,)
    one_line(lambda: header(link, follow=False), str(link), "cannot be read")


def test_every_dtype_comes_back_and_is_that_of_the_library(tmp_path):
    tensors = {
        name: (torch.arange(24).reshape(4, 6) % 2).to(dtype) for name, dtype in STORED.items()
    }
    path = tmp_path / "x.safetensors"
    shapes = {name: (x.dtype, x.shape) for name, x in tensors.items()}
    write_file(path, shapes, tensors.__getitem__, {}, sync=True)
    reader, theirs = TensorReader(header(path)), library.load_file(path)
    for name, x in tensors.items():
        for got in (reader.read_stored(name), theirs[name]):
            assert got.dtype == x.dtype
            assert torch.equal(got.view(torch.uint8), x.view(torch.uint8))
    reader.close()


def test_a_dtype_that_torch_has_not(tmp_path):
    path = written(tmp_path / "x", json.dumps({"a": row(0, 8, (4,), "F4")}))
    reader = TensorReader(header(path))
    one_line(lambda: reader.read_stored("a"), "F4", "dtype")
