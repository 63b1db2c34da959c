"""The search for a mesh."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest

from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.model.presets import preset
from dtron.moe.config import MoEConfig
from dtron.planner.gpu_rates import load_gpu
from dtron.runtime.config import DataConfig, RunConfig
from dtron.runtime.exit import run_cli
from dtron.tools import plan, plan_search
from dtron.tools.plan import plan_config, without_search
from dtron.tools.plan_search import Search, frontier, meshes_of

MODEL = replace(preset("bench-1.3b"), layers=4, context=4096)
CONFIG = RunConfig(model=MODEL, data=DataConfig(seq_len=4096, document_mask=False))


@pytest.fixture(scope="module")
def found():
    search = Search(CONFIG, load_gpu("h200"), 4, 16)
    with mock.patch.object(plan_search, "POLICIES", ("none",)):
        return search, search.run()


def test_every_mesh_has_all_gpus():
    experts = replace(MODEL, moe=MoEConfig(8, 2, 32))
    for model in (MODEL, experts):
        shapes = list(meshes_of(24, model, 256, 8))
        assert len(shapes) == len(set(shapes)) and all(s.size == 24 for s in shapes)
        assert any(s.ep > 1 for s in shapes) == (model is experts)
    assert any(s.cp > 1 for s in meshes_of(8, MODEL, 32768, 8))


def test_the_fastest_is_first_and_all_fit(found):
    search, choices = found
    speeds = [x.tokens_per_second for x in choices]
    assert speeds == sorted(speeds, reverse=True) and len(choices) > 10
    assert all(x.gib <= search.gpu.memory_gib for x in choices)
    for a in frontier(choices):
        assert not any(b.gib < a.gib and b.tokens_per_second > a.tokens_per_second for b in choices)


@pytest.mark.parametrize(
    ("mesh", "zero"), [("dp=4", 0), ("dp=4", 3), ("dp=2,tp=2", 1), ("pp=2,tp=2", 0)]
)
def test_a_choice_is_near_its_plan(found, mesh, zero):
    """Memory within a tenth, time within a fifth: the search puts a plan together from blocks."""
    shape = MeshShape.parse(mesh)
    alike = [x for x in found[1] if x.shape == shape and x.config.zero == zero]
    choice = next(x for x in alike if x.config.micro_batch == 2)
    whole = plan_config(choice.config)
    assert abs(choice.gib / whole.gib - 1) < 0.1
    assert abs(choice.seconds / whole.seconds - 1) < 0.2


def test_heads_that_cannot_be_split_are_refused_with_the_reason():
    few_heads = replace(CONFIG, model=replace(MODEL, kv_heads=4))
    search = Search(few_heads, load_gpu("h200"), 64, 64)
    with mock.patch.object(Search, "_candidates", return_value=()):
        search.run()
    assert "dp=8,tp=8" in search.refused and "heads" in search.refused["dp=8,tp=8"]


def test_a_mesh_that_only_its_plan_refuses_has_a_reason():
    """FP8 needs matrices of some size on a rank, which tp makes smaller."""
    search = Search(replace(CONFIG, fp8="tensorwise"), load_gpu("h200"), 2, 8)
    with mock.patch.object(plan_search, "POLICIES", ("none",)):
        assert search.run() == []
    assert all("--fp8 tensorwise" in reason for reason in search.refused.values())


def test_a_model_that_no_device_trains_is_refused_at_once():
    long = replace(CONFIG, data=replace(CONFIG.data, seq_len=8192))
    with pytest.raises(UserError, match="longer than model.context"):
        Search(long, load_gpu("h200"), 4, 16).run()


def test_no_block_is_planned_where_weights_alone_do_not_fit():
    small = replace(load_gpu("h200"), memory_gib=1.0)
    search = Search(CONFIG, small, 2, 8)
    with mock.patch.object(plan_search, "block_cost", side_effect=AssertionError("planned")):
        assert search.run() == []
    assert search.too_large > 0


def test_a_plan_takes_the_other_arguments():
    argv = ["--gpus", "8", "--model", "tiny", "--batch-tokens=4M", "--top", "3", "--gpu", "h200"]
    argv += ["-o", "a.html", "--output=b.html"]
    assert without_search(argv) == ["--model", "tiny", "--gpu", "h200"]


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ("--gpus 0", ["--gpus 0", "from 1"]),
        ("--batch-tokens lots", ["--batch-tokens lots", "15T"]),
        ("--batch-tokens 10", ["--batch-tokens 10", "one sequence"]),
        ("--gpu x", ["--gpu x", "h200"]),
        ("--mesh dp=2", ["--mesh", "the search chooses it"]),
        ("--pipeline.schedule zb-v", ["--pipeline", "the search chooses it"]),
        ("--mseh dp=2", ["--mseh", "unknown flag"]),
    ],
)
def test_a_wrong_search_is_one_line(argv, parts, capsys):
    assert run_cli(plan.main, ["search", "--model", "tiny", *argv.split()]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    for part in parts:
        assert part in line
