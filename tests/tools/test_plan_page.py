"""The pages of ``dtron plan`` and of its search: what they draw is what was planned."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtron.distributed.mesh_shape import MeshShape
from dtron.planner.gpu_rates import load_gpu
from dtron.planner.mesh_places import axes_in_use, coordinates, group_of, ranks_text
from dtron.planner.report import GIB
from dtron.planner.step_time import axis_size
from dtron.runtime.config import RunConfig
from dtron.runtime.exit import run_cli
from dtron.testing import assert_caught
from dtron.tools import charts, plan, plan_charts
from dtron.tools.html_page import page
from dtron.tools.mesh_chart import mesh_chart
from dtron.tools.plan_page import plan_page
from dtron.tools.plan_search import Choice, Search, frontier
from dtron.tools.search_page import search_page
from tests.helpers.browser import CHROMIUM, in_browser
from tests.helpers.paths import ROOT

ARGV = ["--model", "bench-1.3b", "--mesh", "pp=4,tp=2"]


@pytest.fixture(scope="module")
def drawn():
    """The plan of the docs' figures, and the module that draws them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs" / "draw"))
        import plan_figure

        return plan_figure.example(), plan_figure


@pytest.fixture(scope="module")
def step(drawn):
    return drawn[0]


def marks(root: ET.Element, key: str) -> list[ET.Element]:
    return [g for g in root.iter("g") if g.get("class") == "mark" and g.get(key) is not None]


def parsed(canvas) -> ET.Element:
    return ET.fromstring(canvas.inline("a picture"))


# ---- the page of a plan


def test_a_page_is_one_file_with_everything(step):
    text = plan_page(step, ARGV, "h200", 1e12)
    assert "http" not in text and "import" not in text
    root = ET.fromstring(text)
    words = " ".join(root.itertext())
    said = (" ".join(["dtron plan", *ARGV]), torch.__version__, "gpu/h200.json", "GPU-hours")
    spoken = " ".join(words.split())
    assert all(part in spoken for part in said)
    assert len(list(root.iter("svg"))) == 4 and len(list(root.iter("title"))) > 100
    assert all(tag.get("src") is None and tag.get("href") is None for tag in root.iter())


def assert_bars_are_bytes(step) -> None:
    root = parsed(plan_charts.memory_chart(step))
    bars = {}
    for g in marks(root, "data-kind"):
        (rect,) = g.findall("rect")
        bars[int(g.get("data-rank")), g.get("data-kind")] = float(rect.get("width"))
    rows = plan_charts.memory_of(step)
    want = {(i, kind): n for i, row in enumerate(rows) for kind, n in row.items() if n}
    assert bars.keys() == want.keys()
    wide, scale = max(bars.values()), max(want.values())
    assert all(abs(bars[key] - n * wide / scale) < 0.2 for key, n in want.items())
    for i, r in enumerate(step.ranks):
        total = sum(r.peak.values()) + step.gpu.overhead_gib * GIB
        assert sum(n for (rank, _), n in want.items() if rank == i) == total


def test_each_rank_and_kind_has_a_bar_as_long_as_its_bytes(step):
    assert_bars_are_bytes(step)


def test_bars_that_are_too_long_are_caught(step):
    """Mutant: the bars of memory are as long as the root of their bytes."""
    with mock.patch.object(charts.Scale, "size", lambda self, x: 300 * x**0.5):
        assert_caught(lambda: assert_bars_are_bytes(step))


def test_a_full_gpu_has_a_line(step):
    full = replace(step, gpu=replace(step.gpu, memory_gib=2.0))
    words = "".join(parsed(plan_charts.memory_chart(full)).itertext())
    assert "memory of the GPU: 2 GiB" in words and "does not fit" in plan_page(full, [], "h200", 0)


def test_the_timeline_has_each_action_of_the_schedule(step):
    root = parsed(plan_charts.timeline(step))
    titles = [t.text for t in root.iter("title")]
    for stage in range(8):
        for part in ("forward", "input gradient", "weight gradient"):
            found = [t for t in titles if t.startswith(f"{part} of") and f"stage {stage}\n" in t]
            assert len(found) == 8  # microbatches
    assert sum("rank 0, tp:" in t and "messages" in t for t in titles) == 1


def test_spans_and_waits_fill_the_step(step):
    for t in step.times:
        parts = sorted((s.start, s.end) for s in (*t.spans, *t.waits))
        assert all(abs(a[1] - b[0]) < 1e-9 for a, b in zip(parts, parts[1:], strict=False))
        assert parts[0][0] == 0 and abs(parts[-1][1] - t.now) < 1e-9
        assert abs(sum(w.end - w.start for w in t.waits) - t.bubble) < 1e-9
        assert abs(sum(m.exposed for m in t.messages) - sum(t.exposed.values())) < 1e-9


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="the figures are of 2.13")
def test_the_figures_are_current(drawn):
    example, figure = drawn
    for name, svg in figure.plans(example).items():
        file = ROOT / "docs" / "figures" / name
        assert file.read_text() == svg, "run python docs/draw/figures.py"


# ---- parts of charts


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=8))
def test_shares_cover_the_time_once(parts):
    parts = [(min(p), max(p)) for p in parts]
    covered = {i for a, b in parts for i in range(a, b)}
    shares = charts.shares(parts, 40, 8)
    assert all(0 <= x <= 1 + 1e-9 for x in shares)
    assert abs(5 * sum(shares) - len(covered)) < 1e-6


@given(st.floats(1e-6, 1e6))
def test_ticks_are_few_and_within(most):
    ticks = charts.Scale(most, 0, 100).ticks()
    assert ticks[0] == 0 and 3 <= len(ticks) <= 8 and ticks[-1] <= most * (1 + 1e-9)


MESHES = ["dp=1", "dp=4,tp=2,ep=4", "pp=2,dp=8,cp=2,tp=4,ep=8", "dp_replicate=3,dp=2", "pp=4,tp=8"]


@pytest.mark.parametrize("mesh", MESHES)
def test_groups_are_those_of_the_mesh(mesh):
    shape = MeshShape.parse(mesh)
    for axis in axes_in_use(shape):
        n, groups = axis_size(shape, axis), [group_of(shape, axis, r) for r in range(shape.size)]
        assert all(rank in g and len(g) == n for rank, g in enumerate(groups))
        assert len(set(map(tuple, groups))) * n == shape.size  # each rank is in one group
        if axis in shape.sizes:
            for g in groups:
                others = [{**coordinates(shape, r), axis: 0} for r in g]
                assert all(place == others[0] for place in others)


@pytest.mark.parametrize("mesh", [*MESHES, "dp=32,tp=8,pp=4", "dp=1024", "pp=32,dp=16"])
def test_a_mesh_is_drawn_within_its_picture(mesh):
    shape = MeshShape.parse(mesh)
    root = parsed(mesh_chart(shape, 8))
    shown = [int(g.get("data-rank")) for g in marks(root, "data-rank")]
    assert shown == sorted(set(shown)) and shown[0] == 0 and max(shown) < shape.size
    assert len(shown) == shape.size or len(shown) >= 64
    assert len(shown) == shape.size or "more" in "".join(root.itertext())


def test_ranks_as_text():
    assert ranks_text([3, 4, 5]) == "3 to 5" and ranks_text([0, 8]) == "0, 8"
    assert ranks_text(list(range(0, 256, 8))) == "0, 8, 16, ... 248"


# ---- the page of a search


def choice(gib: float, speed: float, recompute: str = "none") -> Choice:
    config = RunConfig(mesh="pp=2,dp=4", zero=1, recompute=recompute, batch=16, micro_batch=2)
    return Choice(config, MeshShape.parse("pp=2,dp=4"), 2, gib, 100 / speed, speed, 0.4)


CHOICES = [choice(80, 900), choice(60, 800, "full"), choice(70, 700), choice(20, 300, "selective")]


def searched(choices=CHOICES):
    found = Search(RunConfig(), load_gpu("h200"), 8, 16)
    found.refused, found.too_large = {"tp=8": "heads & more < 8"}, 5
    return search_page(found, choices, ["--gpus", "8"], "dtron plan --model tiny", "h200")


def test_each_choice_is_a_point_with_its_command():
    text = searched()
    root, best = ET.fromstring(text), frontier(CHOICES)
    titles = [t.text for t in root.iter("title")]
    for x in CHOICES:
        (title,) = [t for t in titles if f"{x.gib:.1f} GiB" in t]
        assert f"dtron plan --model tiny {x.flags}" in title and str(x.shape) in title
    assert len(marks(root, "data-front")) == len(best) == 3
    assert "heads & more < 8" in "".join(root.itertext()) and "http" not in text


def test_a_search_without_a_choice_has_a_page():
    words = "".join(ET.fromstring(searched([])).itertext())
    assert "No choice is possible" in words and "heads" in words


# ---- the file


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("none/plan.html", "there is no folder"),
        (".", "is a folder"),
        ("", "is a folder"),
        ("x" * 300, "cannot be written"),
    ],
)
@pytest.mark.parametrize("first", [["--output"], ["search", "-o"]])
def test_a_file_that_cannot_be_written_is_refused_before_the_plan(
    name, part, first, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with mock.patch.object(plan, "quiet", side_effect=AssertionError("planned")):
        assert run_cli(plan.main, [*first, name, "--model=tiny"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--output" in line and part in line and len(list(tmp_path.iterdir())) == 0


def test_a_full_disk_is_one_line(capsys, step):
    argv = ["-o=/dev/full", "--model=tiny"]
    with mock.patch.object(plan, "plan_config", return_value=step):
        assert run_cli(plan.main, argv) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--output /dev/full" in line and "No space left" in line


# ---- a browser


@pytest.mark.skipif(not CHROMIUM, reason="needs a Chromium: apt-get install chromium")
def test_a_browser_shows_the_text_under_the_pointer(tmp_path):
    dom, console = in_browser(tmp_path / "search.html", searched(), 0)
    assert not console
    (hovered,) = [part.split('"')[0] for part in dom.split('data-hovered="')[1:]]
    assert "pp=2,dp=4: ZeRO 1, 1f1b" in hovered and "dtron plan --model tiny --mesh" in hovered
    assert "<title>pp=2" not in dom and 'aria-label="pp=2' in dom


@pytest.mark.skipif(not CHROMIUM, reason="needs a Chromium: apt-get install chromium")
def test_a_browser_opens_a_plan_without_errors(tmp_path, step):
    dom, console = in_browser(tmp_path / "plan.html", plan_page(step, ARGV, "h200", 0), 2)
    assert not console and 'data-hovered="rank 2: pp 1, tp 0' in dom


@pytest.mark.skipif(not CHROMIUM, reason="needs a Chromium: apt-get install chromium")
def test_an_error_of_a_script_is_noticed(tmp_path):
    broken = page("broken", [], ["<script>nothing.there();</script>"])
    assert "Uncaught ReferenceError" in in_browser(tmp_path / "a.html", broken, 0)[1]
