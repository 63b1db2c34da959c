"""python -m dtron.schedules, without torch: tables, pictures, and what it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

from dtron.runtime.exit import run_cli
from dtron.schedules import SCHEDULES, Costs, make, simulate
from dtron.schedules.__main__ import main
from dtron.tools.draw_schedules import svg, text

SVG = "{http://www.w3.org/2000/svg}"


def test_compare_prints_and_draws_all(capsys, tmp_path):
    out = tmp_path / "all.svg"
    assert main(["compare", "--stages", "4", "--microbatches", "8"]) == 0
    said = capsys.readouterr().out
    assert all(re.search(rf"│ {name} +│", said) for name in SCHEDULES)
    assert (
        "rank 3           F0 I0 F1 I1 F2 I2 F3 I3 W0" in said
    )  # zb-h1, as in the paper's figure 3
    assert main(["compare", "--stages", "4", "--microbatches", "4", "-o", str(out)]) == 0
    assert "left out: schedule dualpipe-v on 4 ranks: needs at least 8" in " ".join(
        capsys.readouterr().out.split()
    )
    titles = [t.text for t in ET.fromstring(out.read_text()).iter(SVG + "text")]
    assert "gpipe: bubble 42.9%" in titles and "dualpipe-v: bubble 0.0%" not in titles


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_action_is_drawn_where_it_is_timed(name):
    t = make(name, 3, 6)
    line = simulate(t, Costs())
    boxes = [
        b for b in ET.fromstring(svg({name: line})).iter(SVG + "rect") if b.get("stroke") == "#fff"
    ]
    assert len(boxes) == sum(len(row) for row in t.rows)
    scale = (1180 - 68) / line.makespan
    drawn = sorted((float(b.get("x")), float(b.get("width"))) for b in boxes)
    want = sorted(
        (48 + start * scale, (end - start) * scale) for row in line.spans for _, start, end in row
    )
    assert all(a == pytest.approx(b, abs=0.1) for a, b in zip(drawn, want, strict=True))


def test_text_is_a_grid_of_time():
    assert text(simulate(make("1f1b", 2, 2), Costs(1, 1, 1))).splitlines() == [
        "rank 0  F0 F1       B0 ---   B1 ---",
        "rank 1     F0 B0 ---F1 B1 ---",
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("draw zbv", "invalid choice: 'zbv'"),
        ("draw", "name"),
        ("compare --stages x", "--stages: invalid int value: 'x'"),
        ("compare --stages 0", "ranks=0; there must be at least 1"),
        ("compare --F -1", "--F: invalid duration value: '-1'"),
        ("compare --F 1e308", "--F: invalid duration value: '1e308'"),
        ("draw zb-v --F 0 --I 0 --W 0", "nothing takes time"),
        ("compare --stages 65536", "--stages 65536 --microbatches 8 --stages-per-rank 2: 1048576"),
        ("compare --transfer inf", "--transfer: invalid duration value"),
        ("compare --stagse 4", "unrecognized arguments: --stagse"),
        ("draw dualpipe-v --microbatches 3", "needs at least 8 microbatches, has 3"),
        ("draw zb-v -o /dev/null/x.svg", "-o /dev/null/x.svg: cannot be written"),
        ("", "command"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(capsys, argv, message):
    assert run_cli(main, argv.split()) == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(r"error: [^\n]+\n", err) and message in err and not out


def test_it_needs_no_torch():
    code = "import sys; from dtron.schedules.__main__ import main; main(['draw', 'zb-v']); "
    code += "assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
