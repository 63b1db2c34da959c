"""The page of ``dtron report``: each curve that the files of the runs have, and only these."""

from __future__ import annotations

import json
import math
import re
import tracemalloc
import xml.etree.ElementTree as ET
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest

from dtron.errors import UserError
from dtron.model.config import ModelConfig
from dtron.runtime.cli import text
from dtron.runtime.config import RunConfig
from dtron.runtime.exit import run_cli
from dtron.runtime.step_records import each_step
from dtron.testing import assert_caught
from dtron.tools import curve_chart
from dtron.tools.curves import METRICS, EvenSample, Metric, Point, ThinnedCurve, segments, thin
from dtron.tools.report import main, report_page
from dtron.tools.run_record import differences, read_records
from tests.helpers.browser import CHROMIUM, in_browser
from tests.helpers.paths import ROOT

MODEL = ModelConfig(layers=2, vocab=300)
START = {"time": "2026-11-30T12:00:00+00:00", "step": 0, "commit": "c0ffee", "mesh": "dp=2"}


def record(step: int, **more) -> dict:
    usual = {"loss": 5 / step, "grad_norm": 1.0, "lr": 1e-3, "tokens": 64 * step, "mfu": None}
    speed = {"tokens_per_s": 1e4, "peak_memory_gib": 2.0, "step_seconds": 36.0}
    return {"step": step, **usual, **speed, "data_wait_ratio": 0.25, **more}


def write(folder: Path, records: list[dict], rest: str = "", **config) -> Path:
    """A run directory. ``rest``: what follows the last whole line."""
    folder.mkdir(parents=True)
    config = {"model": MODEL, "steps": 30, "run_dir": str(folder), **config}
    (folder / "config.json").write_text(text(RunConfig(**config)))
    (folder / "starts.jsonl").write_text(json.dumps(START) + "\n")
    lines = "".join(json.dumps(x) + "\n" for x in records)
    (folder / "metrics.jsonl").write_text(lines + rest)
    return folder


STEPS = [
    record(i, **({"validation_loss": 4.0 - i / 10} if i % 5 == 0 else {})) for i in range(1, 31)
]


@pytest.fixture
def runs(tmp_path) -> list[str]:
    experts = [x | {"experts.0.load_max": 1.5, "experts.1.load_max": 2.5} for x in STEPS[:20]]
    a = write(tmp_path / "a", STEPS)
    b = write(tmp_path / "b & <c>", experts, zero=3, optim=replace(RunConfig().optim, lr=0.5))
    return [str(a), str(b)]


def page_of(*paths: str) -> tuple[str, ET.Element]:
    page = report_page(read_records(paths), list(paths))
    return page, ET.fromstring(page)


def drawn(root: ET.Element) -> dict[tuple[str, str], ET.Element]:
    """The curves of a page, by the chart's title and the run's name."""
    return {
        (svg.find("text").text, g.get("data-run")): g
        for svg in root.iter("svg")
        for g in svg.iter("g")
        if g.get("data-kind") == "raw"
    }


# ---- the page


def points_of(metric: Metric, run: str) -> list[Point]:
    """The points of the steps that have this number, in the file of a run."""
    steps = list(each_step(Path(run) / "metrics.jsonl"))
    found = ((x["step"], metric.of(x)) for x in steps)
    return [(step, x) for step, x in found if x is None or not math.isnan(x)]


def assert_curves_are_the_numbers(paths: list[str]) -> None:
    """Each number of a run has a curve, whose heights are the numbers on one linear scale."""
    page, root = page_of(*paths)
    found = drawn(root)
    want = {}
    for run, path in zip(read_records(paths), paths, strict=True):
        for metric in METRICS:
            points = points_of(metric, path)
            if any(x is not None for _, x in points):
                want[metric.title, run.name] = thin(points)
    assert found.keys() == want.keys()
    for (title, _), g in found.items():
        points = want[title, g.get("data-run")]
        assert json.loads(g.get("data-steps")) == [step for step, _ in points]
        values = json.loads(g.get("data-values"))
        assert values == [x and pytest.approx(x, rel=1e-5) for _, x in points]
        places = [tuple(map(float, p.split(","))) for line in g.iter("polyline")
                  for p in line.get("points").split()]  # fmt: skip
        numbers = [(step, x) for part in segments(points) for step, x in part]
        assert len(places) == len(numbers)
        assert linear([s for s, _ in numbers], [x for x, _ in places])
        assert linear([x for _, x in numbers], [-y for _, y in places])


def linear(xs: list[float], ys: list[float]) -> bool:
    """Whether pixels follow values on one rising line."""
    low, high = min(xs), max(xs)
    if low == high:
        return max(ys) - min(ys) < 0.2
    a, b = ys[xs.index(low)], ys[xs.index(high)]
    shares = [(x - low) / (high - low) for x in xs]
    return b > a and all(abs(a + s * (b - a) - y) < 0.2 for s, y in zip(shares, ys, strict=True))


def test_each_number_of_each_run_has_a_curve(runs):
    assert_curves_are_the_numbers(runs)
    assert_curves_are_the_numbers(runs[:1])
    titles = {title for title, _ in drawn(page_of(*runs)[1])}
    assert titles == {
        "Loss",
        "Validation loss",
        "Gradient norm",
        "Learning rate",
        "Tokens per second",
        "Peak memory of rank 0",
        "Time waiting for data",
        "Largest load of an expert",
    }


@pytest.mark.parametrize(
    ("where", "name", "wrong"),
    [
        (curve_chart.Axis, "__call__", lambda axis, x: axis.start + axis.length * x**0.5),
        (curve_chart, "thin", lambda points: list(points)[1:]),
        (curve_chart, "segments", lambda points: [[(s, x or 0.0) for s, x in points][:-1]]),
    ],
)
def test_wrong_curves_are_caught(runs, where, name, wrong):
    """Mutants: a root in the scale, a step left out, a curve without its end."""
    with mock.patch.object(where, name, wrong):
        assert_caught(lambda: assert_curves_are_the_numbers(runs))


def test_a_page_is_one_file_that_needs_no_network(runs):
    page, root = page_of(*runs)
    assert "http" not in page and "import" not in page
    assert all(tag.get("src") is None and tag.get("href") is None for tag in root.iter())
    ids = [tag.get("id") for tag in root.iter() if tag.get("id")]
    assert len(ids) == len(set(ids))


def test_a_page_says_what_the_directories_have(runs):
    words = " ".join("".join(page_of(*runs)[1].itertext()).split())
    for part in ("b & <c>", "c0ffee", "30 steps", "20 of 30 steps", "dp=2", "ZeRO 3", "1.92k"):
        assert part in words, part
    assert "[optim]" in words and "lr = 0.5" in words  # the config
    assert "blocks.0-1." in words  # placements
    one = " ".join("".join(page_of(runs[0])[1].itertext()).split())
    assert "1.0000best validation loss, step 30" in one and "18.0 min" in one


def test_runs_differ_in_their_flags(runs):
    first, second = read_records(runs)
    found = differences([first, second])
    assert found == {"zero": [1, 3], "optim.lr": [first.config.optim.lr, 0.5]}
    assert "configs of the runs are equal" in report_page([first, first], [])


@pytest.mark.parametrize(
    "rest", ["", '{"step": 31, "lo', "\0\0\0", "[1]\n", '{"step": 31}\n', "\xff"]
)
def test_an_interrupted_run_has_a_page(tmp_path, rest):
    whole = page_of(str(write(tmp_path / "x" / "a", STEPS)))[0]
    cut = page_of(str(write(tmp_path / "y" / "a", STEPS, rest)))[0]
    assert cut.replace("/y/", "/x/") == whole


def test_a_run_without_a_step_has_a_page(tmp_path):
    run = write(tmp_path / "a", [])
    assert "No step is recorded yet" in page_of(str(run))[0]
    (run / "metrics.jsonl").unlink()
    (run / "starts.jsonl").unlink()
    assert "no record of a start" in page_of(str(run))[0]


def test_a_loss_that_is_not_finite_is_a_gap(tmp_path):
    run = write(
        tmp_path / "a", [record(i, loss=None if i in (4, 5) else 1 / i) for i in range(1, 9)]
    )
    assert_curves_are_the_numbers([str(run)])
    g = drawn(page_of(str(run))[1])["Loss", "a"]
    assert len(list(g.iter("polyline"))) == 2


def used(place: Path, count: int) -> int:
    """The peak of memory of reading a run of so many steps."""
    run = write(place, [])
    line = json.dumps(record(7, padding="x" * 20000)) + "\n"
    (run / "metrics.jsonl").write_text(line * count)
    tracemalloc.start()
    (found,) = read_records([str(run)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.steps == count and found.hours == pytest.approx(count / 100)
    return peak


def test_a_long_run_takes_no_more_memory(tmp_path, monkeypatch):
    """And an older reader of whole files is caught."""
    for kept in (ThinnedCurve, EvenSample):
        monkeypatch.setattr(f"dtron.tools.run_record.{kept.__name__}", partial(kept, most=20))
    read = lambda short, long: used(tmp_path / long, 400) < 1.3 * used(tmp_path / short, 100)
    assert read("a", "b")
    whole = lambda path: iter(list(each_step(path)))
    monkeypatch.setattr("dtron.tools.run_record.each_step", whole)
    assert not read("c", "d")


def test_a_single_step_is_a_dot(tmp_path):
    g = drawn(page_of(str(write(tmp_path / "a", STEPS[:1])))[1])["Loss", "a"]
    assert len(list(g.iter("path"))) == 1 and not list(g.iter("polyline"))


# ---- the command


def test_the_page_is_written_into_the_first_run(runs, capsys):
    assert run_cli(main, runs) == 0
    page = Path(runs[0]) / "report.html"
    assert capsys.readouterr().out == f"drawn to {page}\n"
    ET.fromstring(page.read_text())
    assert run_cli(main, [*runs, "-o", str(page.with_name("other.html"))]) == 0
    assert page.with_name("other.html").is_file()


def test_what_is_no_run_is_one_line(runs, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    cases = {
        (str(tmp_path),): "is no run directory",
        (str(tmp_path / "none"),): "is no run directory",
        (str(tmp_path / "model"),): "is no config of a run",
        (runs[0], f"{runs[0]}/"): "is given twice",
        (runs[0], "-o", str(tmp_path)): "is a folder",
        (): "RUN",
    }
    for argv, part in cases.items():
        assert run_cli(main, list(argv)) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert part in line, line


def test_runs_of_one_name_have_their_paths(tmp_path):
    a, b = (write(tmp_path / x / "run", STEPS[:2]) for x in ("x", "y"))
    assert [r.name for r in read_records([str(a), str(b)])] == [str(a), str(b)]
    with pytest.raises(UserError, match="given twice"):
        read_records([str(a), str(a)])


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs a Chromium: apt-get install chromium")
def test_the_screenshots_of_the_page_can_be_taken_again(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "draw"))
    import report_screenshots as program

    made = program.screenshots(tmp_path, tmp_path, steps=30)
    pictures = sorted(program.FOLDER.glob("report-*.png"))
    assert [file.name for file in pictures] == sorted(file.name for file in made)
    for file in made:
        picture = program.FOLDER / file.name
        assert program.size_of(file) == program.size_of(picture), f"run {program.__file__}"
        assert picture.stat().st_size <= program.LARGEST
        assert file.stat().st_size > program.LARGEST / 5  # an empty page has few bytes


@pytest.mark.skipif(not CHROMIUM, reason="needs a Chromium: apt-get install chromium")
def test_a_browser_shows_the_numbers_under_the_pointer(tmp_path):
    runs = [write(tmp_path / name, STEPS[10:]) for name in ("a", "b & <c>")]  # of steps 11 to 30
    page = page_of(*map(str, runs))[0]
    dom, console = in_browser(tmp_path / "report.html", page, 0)  # in the middle
    assert not console
    (hovered,) = [part.split('"')[0] for part in dom.split('data-hovered="')[1:]]
    assert re.fullmatch(
        r"step (20\na: 0.25\nb &amp; .*: 0.25|21\na: 0.238095\nb &amp; .*: 0.238095)", hovered
    )
