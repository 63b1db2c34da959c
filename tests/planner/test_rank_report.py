"""``dtron plan --trace``: what one rank of a mesh launches and sends."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from dtron.distributed.mesh_shape import MeshShape
from dtron.planner.fake_mesh import fake_mesh
from dtron.planner.gpu_rates import load_gpu
from dtron.planner.plan_step import plan_rank, plan_ranks
from dtron.planner.rank_report import check_rank, message_of, place_lines
from dtron.planner.step_time import time_step
from dtron.runtime.cli import parse
from dtron.runtime.exit import run_cli
from dtron.tools import plan
from dtron.tools.verify_step import one_step
from tests.helpers.same_step import model_config
from tests.helpers.texts import one_line

SMALL = ["--model=tiny", "--model.layers=2", "--batch=8", "--micro-batch=2", "--data.seq-len=64"]
MESH = "pp=2,dp=2,tp=2"


def config(*more: str, mesh: str = MESH):
    return parse([*SMALL, "--mesh", mesh, *more], plan.PlanConfig(), prog="dtron plan")


def test_every_rank_does_what_the_first_rank_of_its_stage_does():
    """On a mesh that divides all dims. Also, a plan is the same when its mesh was planned before,
    and when ranks were simulated on an equal mesh."""
    one_step(model_config("dp=2,tp=2", 2, batch=4, micro_batch=2), MeshShape.parse("dp=2,tp=2"))
    shape, c = MeshShape.parse(MESH), config()
    resolved = plan.compiled_plan(c, shape)
    stages = plan_ranks(c, resolved)
    for rank in (0, 3, 6):
        got, want = plan_rank(c, resolved, rank), stages[rank // 4]
        assert got.stages == want.stages and got.state == want.state
        assert got.peak == want.peak and got.largest == want.largest
        pairs = zip(got.operators, want.operators, strict=True)
        assert all((a.kind, a.name, a.written) == (b.kind, b.name, b.written) for a, b in pairs)


def test_simulated_ranks_work_after_the_plan_of_a_larger_mesh():
    """Known bug: the groups of all meshes were made anew, and torch's plans of redistributions had
    the names of the old ones."""
    small = model_config("dp=3", 1, layers=1, batch=3, micro_batch=1)
    want = one_step(small, MeshShape.parse("dp=3"))
    fake_mesh(MeshShape.parse("dp=1000"))
    one_step(model_config("dp=2", 1, layers=1, batch=2, micro_batch=1), MeshShape.parse("dp=2"))
    assert one_step(small, MeshShape.parse("dp=3")).norm == want.norm


def test_a_rank_with_a_smaller_shard_has_less():
    """1,024 rows of the MLP over three ranks: the last has two rows less."""
    c = config("--batch=6", "--zero=3", mesh="dp=3")
    resolved = plan.compiled_plan(c, MeshShape.parse("dp=3"))
    first, last = (plan_rank(c, resolved, rank) for rank in (0, 2))
    assert first.state["parameters"] > last.state["parameters"]


def test_the_messages_add_up_to_those_of_the_plan():
    shape, c, gpu = MeshShape.parse(MESH), config("--zero=2"), load_gpu("h200")
    ranks = plan_ranks(c, plan.compiled_plan(c, shape))
    for rank, time in zip(ranks, time_step(ranks, shape, gpu), strict=True):
        sent: Counter = Counter()
        for op in rank.operators:
            if message := message_of(op, rank, shape):
                sent[message.axis] += message.sent
        assert set(sent) <= {"pp", "dp", "tp"}  # each group is known
        assert {k: round(n) for k, n in sent.items()} == {k: round(n) for k, n in time.sent.items()}


def test_the_view_of_a_rank(capsys):
    assert plan.main([*SMALL, "--mesh", MESH, "--trace", "6"]) == 0
    said = capsys.readouterr().out
    for part in ("rank 6 of 8: pp 1, dp 1, tp 0", "tp: ranks 6, 7", "mm", "receive", "nvlink"):
        assert part in said


def test_json_has_the_operators_in_order(capsys):
    assert plan.main([*SMALL, "--mesh", MESH, "--trace", "1", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["groups"] == {"pp": [1, 5], "dp": [1, 3], "tp": [0, 1]}
    operators = found["operators"]
    marks = [op["name"] for op in operators if op["kind"] == "mark"]
    assert marks == ["F0.0", "F0.1", "B0.0", "B0.1", "reduce"]
    waited = set()
    for op in reversed(operators):  # a collective is issued before its wait
        if op["kind"] == "wait":
            waited.add(op["token"])
        elif op.get("token") in waited:
            waited.remove(op["token"])
    assert not waited - {0}


@pytest.mark.parametrize("rank", [-1, 8, 517])
def test_a_rank_outside_of_the_mesh_is_refused(rank, capsys):
    one_line(lambda: check_rank(rank, MeshShape.parse(MESH)), f"--trace {rank}", "0 to 7")
    assert run_cli(plan.main, [*SMALL, "--mesh", MESH, f"--trace={rank}"]) == 2
    assert "ranks 0 to 7" in capsys.readouterr().err


def test_a_trace_has_no_page(capsys, tmp_path):
    argv = [*SMALL, "--trace=0", "-o", str(tmp_path / "a.html")]
    assert run_cli(plan.main, argv) == 2
    assert "--trace --output" in capsys.readouterr().err


def test_the_place_of_one_device():
    assert place_lines(0, MeshShape(), load_gpu("h200")) == [
        "rank 0 of 1: one device; GPU 0 of host 0"
    ]
