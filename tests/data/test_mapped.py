"""dtron.data.mapped: a mapped file that is cut is one line. Without a check it is SIGBUS."""

import os
from pathlib import Path

import numpy as np
import pytest

from dtron.data import __main__ as program
from dtron.data import open_data
from dtron.data.config import DataConfig
from dtron.data.indexed import Indexed, Writer
from tests.helpers.texts import one_line


def pair(prefix: Path) -> None:
    with Writer(prefix, "<u2") as out:
        for _ in range(200):
            out.document(np.arange(100))


@pytest.mark.parametrize("packing", ["concatenate", "best-fit"])
@pytest.mark.parametrize("suffix", [".bin", ".idx", ".uint16"])
def test_a_file_that_is_cut_while_it_is_read_is_one_line(tmp_path, packing, suffix):
    pair(tmp_path / "cut")
    (tmp_path / "a.txt").write_text("one and two " * 2000)
    path = tmp_path / ("a.txt" if suffix == ".uint16" else "cut")
    d = DataConfig(path=str(path), seq_len=16, packing=packing)
    data = open_data(d, 300, 0, 100, tmp_path)
    data.train.rows(0, 4)
    (file,) = tmp_path.glob(f"*{suffix}")
    os.truncate(file, 1024)
    if packing == "best-fit" and suffix == ".idx":
        data.train.rows(4, 4)  # the index has been read
        return
    one_line(lambda: data.train.rows(4, 4), file.name, "was cut from", "to 1024 bytes")


def test_a_file_that_is_cut_while_it_is_described_is_one_line(tmp_path, monkeypatch):
    pair(tmp_path / "cut")
    opened = Indexed(tmp_path / "cut")
    os.truncate(tmp_path / "cut.bin", 1024)
    monkeypatch.setattr(program, "Indexed", lambda _: opened)
    one_line(lambda: program.main(["info", str(tmp_path / "cut")]), "cut.bin", "was cut from")
