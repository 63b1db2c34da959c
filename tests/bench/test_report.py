"""The tables of docs/performance.md and docs/measurements.md show measurements, and the latest of
each case."""

from __future__ import annotations

import json
import sys

import pytest

from dtron.runtime.exit import run_cli
from tests.helpers.paths import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import named  # noqa: E402  (the benchmarks are no part of the package)
import report  # noqa: E402
import step_flags  # noqa: E402

PAGE = ROOT / "docs" / "measurements.md"
FIRST = ROOT / "docs" / "performance.md"


def line(**changes) -> dict:
    """A record of bench/train.py, without the fields that the table does not use."""
    return {
        "model": "bench-1.3b", "mesh": "dp=2", "zero": 3, "rows": 2, "microbatches": 1,
        "seq_len": 4096, "recompute": "none", "compiled": True, "dtype": "bfloat16", "fp8": "none",
        "fp8_first_last": False, "attention_kernel": "auto", "date": "2026-11-24",
        "device": "NVIDIA H200", "torch": "2.13.0",
        "tokens_per_s_per_gpu": 50000, "tflops_per_gpu": 420.4, "mfu": 0.4251, "step_ms": 163.8,
        "host_ms": 20.04, "peak_memory_gib": 22.64, "first_step_s": 71.2, **changes,
    }  # fmt: skip


def peer(**changes) -> dict:
    ours = {"compiled", "fp8", "fp8_first_last", "attention_kernel", "host_ms", "first_step_s"}
    return {"system": "other", **{k: v for k, v in line(**changes).items() if k not in ours}}


def cells(*args) -> list[list[str]]:
    return [
        [c.strip() for c in row.strip("|").split("|")]
        for row in report.table(*args).splitlines()[2:]
    ]


@pytest.mark.parametrize("page", [PAGE, FIRST])
def test_the_pages_have_their_tables(page):
    assert report.main(["--check", str(page)]) == 0


def test_the_first_table_is_short_and_of_named_cases():
    lines = report.read(report.RESULTS)
    rows = named.named_table(lines, report.read_peers()).splitlines()[2:]
    assert 10 <= len(rows) <= 20
    for flags in named.read_named().values():
        step_flags.run_config(step_flags.arguments(flags))  # raises for a case that cannot be
    cited = {name for run in named.read_published() for name in run["cases"]}
    assert cited <= set(named.read_named())


def test_the_newest_plain_line_is_the_one_of_a_case():
    plain = {"fp8": "none", "cuda_graph": True}
    old = line(**plain, date="2026-11-24", tokens_per_s_per_gpu=3)
    new = line(**plain, date="2026-11-25", tokens_per_s_per_gpu=1)
    others = [
        line(**plain, date="2026-11-26", **more)
        for more in ({"optim": "muon"}, {"moments": "bfloat16"}, {"mesh": "tp=2"}, {"rows": 4})
    ]
    others.append(line(**plain, date="2026-11-26", device="NVIDIA H100 80GB HBM3"))
    flags = ["--mesh", "dp=2", "--zero", "3"]
    assert named.newest(flags, [new, old, *others]) is new
    assert named.newest(flags, others) is None


@pytest.mark.parametrize(
    ("old", "new"), [("| system |", "| systems |"), ("| **dtron**", "| dtron"), ("<!-- table", "")]
)
def test_a_page_that_says_otherwise_is_found_and_mended(tmp_path, capsys, old, new):
    page, right = tmp_path / "page.md", PAGE.read_text()
    page.write_text(right.replace(old, new, 1))
    if "table" in old:
        assert run_cli(report.main, ["--check", str(page)]) == 2
        assert "no place for the table; put <!-- table: begin -->" in capsys.readouterr().err
        return
    assert report.main(["--check", str(page)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert report.main(["--write", str(page)]) == 0
    assert page.read_text() == right


def test_a_row_has_what_was_measured():
    peers = [peer(tokens_per_s_per_gpu=rate) for rate in (40000, 30000)]
    assert cells([line()], peers)[0] == [
        "**dtron**, compiled", "bench-1.3b, dp=2, zero 3, bf16, 2 x 4096", "50,000", "420",
        "42.5 %", "22.6", "20.0 / 163.8", "71", "1.25x", "NVIDIA H200, torch 2.13.0, 2026-11-24",
    ]  # fmt: skip


def test_what_is_not_known_is_blank():
    unknown = dict.fromkeys(
        ("tflops_per_gpu", "mfu", "peak_memory_gib", "host_ms", "step_ms", "first_step_s")
    )
    (row,) = cells([line(**unknown)], [])
    assert row[3:9] == [""] * 6 and all(row[:3]) and row[9]


def test_the_latest_line_counts():
    old, new = line(tokens_per_s_per_gpu=9), line(tokens_per_s_per_gpu=1, date="2026-11-25")
    for lines in ([old, new], [new, old]):
        assert [row[2] for row in cells(lines, [])] == ["1"]
    first, second = line(tokens_per_s_per_gpu=3), line(tokens_per_s_per_gpu=2)
    assert [row[2] for row in cells([first, second], [])] == ["2"]


OTHER_CASES = [
    {"model": "bench-8b-width"},
    {"device": "NVIDIA H100 80GB HBM3"},
    {"mesh": "dp=4"},
    {"zero": 1},
    {"fp8": "rowwise"},
    {"fp8": "rowwise", "fp8_first_last": True},
    {"dtype": "float32"},
    {"recompute": "full"},
    {"microbatches": 8},
    {"rows": 4},
    {"seq_len": 8192},
]


@pytest.mark.parametrize("changes", OTHER_CASES)
def test_what_is_another_case_is_a_row_of_its_own_and_not_compared(changes):
    rows = cells([line(), line(**changes)], [peer()])
    assert len(rows) == 3 and len({row[1] for row in rows} | {row[9] for row in rows}) >= 3
    assert [row[8] for row in rows].count("1.00x") == 1
    other = [row for row in cells([line(**changes)], [peer()]) if row[0] == "other"]
    assert not other, "a peer stands beside its own case alone"


@pytest.mark.parametrize(
    "changes", [{"compiled": False}, {"attention_kernel": "flex"}, {"pipeline.schedule": "zb-v"}]
)
def test_another_way_to_run_a_case_is_compared_too(changes):
    rows = cells([line(), line(**changes, tokens_per_s_per_gpu=25000)], [peer()])
    assert len({row[0] for row in rows}) == 3 and len({row[1] for row in rows}) == 1
    assert sorted(row[8] for row in rows) == ["", "0.50x", "1.00x"]


def test_without_dp_the_zero_stage_is_no_difference():
    (row,) = cells([line(mesh="tp=2", zero=1), line(mesh="tp=2", zero=3)], [])
    assert row[1] == "bench-1.3b, tp=2, bf16, 2 x 4096"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("step 3: loss 4", "'step 3: loss 4' is not JSON"),
        ("3", "has no model"),
        (json.dumps({k: v for k, v in line().items() if k != "date"}), "has no date,"),
        (json.dumps(line(device=None)), "has no device,"),
    ],
)
def test_a_line_that_no_benchmark_printed_is_refused(tmp_path, capsys, text, part):
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps(line()) + "\n" + text + "\n")
    assert run_cli(report.main, [str(file)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and f"{file}:2: " in err and part in err


def test_peers_are_whole():
    """The nine measured peers. ``checked`` demands hardware, version and date of each."""
    rows = report.read_peers()
    assert len(rows) == len({(x["system"], report.case_of(x)) for x in rows}) == 9
    assert all((x["zero"] is None) == ("dp=2" not in x["mesh"]) for x in rows)
