"""The programs that measure a GPU's rates and put tables of plans into a page."""

from __future__ import annotations

import sys

import pytest

from dtron.planner.gpu_rates import load_gpu
from dtron.runtime.exit import run_cli
from tests.helpers.paths import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import calibrate  # noqa: E402  (the benchmarks are no part of the package)
import plan  # noqa: E402
import published  # noqa: E402


def test_a_new_file_of_rates_is_whole_and_a_later_one_keeps_the_rest(tmp_path):
    path = tmp_path / "mine.json"
    calibrate.write(path, {"gap_us": 3.0}, "A GPU", 10.5)
    first = load_gpu(str(path))
    assert (first.name, first.memory_gib, first.gap_us) == ("A GPU", 10.5, 3.0)
    assert first.nvlink == load_gpu("h200").nvlink
    assert "those of h200" in first.measured["other rates"]
    calibrate.write(path, {"host_gbs": 7.0}, "A GPU", 10.5)
    later = load_gpu(str(path))
    assert (later.gap_us, later.host_gbs) == (3.0, 7.0)
    assert set(later.measured) == {"other rates", "gap_us", "host_gbs"}


@pytest.mark.parametrize("program", [plan, published])
def test_a_page_without_a_place_is_refused_before_any_plan(program, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("no marks")
    assert run_cli(program.main, ["--write", str(page)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "has no place for the table" in line and page.read_text() == "no marks"


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path, capsys):
    assert run_cli(calibrate.main, ["--out", str(tmp_path / "none" / "a.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err
