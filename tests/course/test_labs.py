"""The labs: the reference solution has all points, the starting file fails with its line, and each
wrong solution has a line of its own."""

from __future__ import annotations

import importlib
import re

import pytest

from dtron.course import lab7_mixtures, lab10_plan, lab10_trace, lab11_layers
from dtron.course.lab import check_lab
from dtron.course.labs import LABS, lab, start
from dtron.model.flops import parameter_count
from dtron.model.presets import preset
from tests.course.wrong.mistake import SOLUTIONS
from tests.helpers.paths import ROOT

MISTAKES = [
    mistake
    for n in LABS
    for mistake in importlib.import_module(f"tests.course.wrong.lab{n}").MISTAKES
]
STARTING = {
    0: "matmuls: matmuls is not written yet (line 9 of lab0_one_device.py)",
    1: "predictions: PREDICTIONS has no answer for 'w_up': the shape on rank 5",
    2: "the layer: mesh tp=2: gradient of scale: a tensor that should be whole on every rank "
    "differs by rank; look at the sum over tp",
    4: "tensor_parallel: mesh tp=2: the output has placements (Partial(sum),), not "
    "(Replicate(),); a sum over tp is still pending",
    5: "zb_h1_row: 2 ranks, 3 microbatches: rank 0 has B(stage 0, microbatch 0); ZB-H1 splits a B "
    "into I and W",
    6: "merge: merge is not written yet (line 18 of lab6_ring_attention.py)",
    7: "sort_by_expert: sort_by_expert is not written yet (line 17 of lab7_experts.py)",
    9: "cost: cost is not written yet (line 11 of lab9_optimizers.py)",
    8: "unit_roundoff, stalls_at, sum_bound: unit_roundoff is not written yet (line 13 of "
    "lab8_numbers.py)",
    10: "step_flops: step_flops is not written yet (line 14 of lab10_speed.py)",
    11: "the weights: Weights has no w_up; declare it: w_up = weight(...)",
    3: "embed_row: embed_row is not written yet (line 8 of lab3_zero.py)",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("course") / "mine"
    start(made)
    return made


@pytest.mark.parametrize("number", LABS)
def test_the_reference_solution_has_all_points(number):
    result = check_lab(lab(number), SOLUTIONS)
    assert (result.line, result.points) == ("", result.of)


@pytest.mark.parametrize("number", LABS)
def test_the_starting_file_fails_with_its_line(number, folder):
    result = check_lab(lab(number), folder)
    assert result.line == STARTING[number] and result.points <= result.of / 4


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: f"{m.lab} {m.name}")
def test_a_wrong_solution_has_its_line(mistake, tmp_path):
    made = lab(mistake.lab)
    (tmp_path / made.file).write_text(mistake.text)
    result = check_lab(made, tmp_path)
    assert mistake.line in result.line, result.line
    assert result.points < result.of
    others = [m.line for m in MISTAKES if m.lab == mistake.lab and m is not mistake]
    assert not any(line in result.line for line in others)


def test_the_index_has_every_lab_with_its_points():
    index = (ROOT / "docs" / "course" / "index.md").read_text()
    rows = re.findall(r"^\| (\d+) \[.*?\]\(([\w-]+)\.md\) \|.*\| (\d+) \|$", index, re.M)
    assert [int(n) for n, *_ in rows] == list(LABS)
    for n, page, points in rows:
        made = lab(int(n))
        assert sum(part.points for part in made.parts) == int(points)
        text = (ROOT / "docs" / "course" / f"{page}.md").read_text()
        assert f"File: `{made.file}`. Check: `dtron course check {n}`." in text
        assert any(part.hidden for part in made.parts)


def test_the_numbers_of_the_pages_are_those_of_the_checks():
    def page(name):
        return " ".join((ROOT / "docs" / "course" / f"{name}.md").read_text().split())

    assert f"{len(lab7_mixtures.MUTANTS)} hidden mutants" in page("experts")
    assert f"{len(lab11_layers.MUTANTS)} hidden mutants" in page("own-layer")
    m, speed = preset("bench-1.3b"), page("speed")
    weights = f"{parameter_count(m):,} weights. AdamW updates all of them, and "
    assert weights + f"{lab10_plan.multiplied(m):,} of them multiply a token" in speed
    assert f"its {len(lab10_trace.kernels()):,} kernels" in speed
    limit = f"At most {lab10_plan.MOST_GIB:g} GiB of each GPU are free, and each GPU should train "
    assert limit + f"at least {lab10_plan.LEAST_TOKENS:,} tokens/s" in speed


@pytest.mark.parametrize("number", LABS)
def test_the_starting_file_names_its_page(number, folder):
    text = (folder / lab(number).file).read_text()
    (page,) = re.findall(r"docs/course/([\w-]+\.md)", text)
    assert (ROOT / "docs" / "course" / page).is_file()


@pytest.mark.parametrize("number", LABS)
def test_there_are_five_wrong_solutions(number):
    assert sum(m.lab == number for m in MISTAKES) >= 5
