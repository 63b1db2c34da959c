"""The memory of a second model: as its weights are on ranks, in the plan, in ``dtron show`` and in
the check at the start."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import to_local
from dtron.distributed.simulated_ranks import simulated
from dtron.losses.config import LossConfig
from dtron.mesh import Layout
from dtron.model.lora import LoraConfig
from dtron.planner.plan_step import SECOND, plan_ranks
from dtron.planner.report import memory_table
from dtron.rules import rules_for
from dtron.runtime import check_memory
from dtron.runtime.cli import parse
from dtron.runtime.config import DataConfig, RunConfig
from dtron.runtime.launch import plan_run
from dtron.runtime.second_memory import second_model_bytes
from dtron.runtime.second_model import second_model
from dtron.schedules import make
from dtron.testing import assert_caught
from dtron.tools import show
from dtron.tools.memory_estimate import size
from dtron.tools.plan import plan_config
from dtron.tools.verify_step import plan_of
from dtron.training.pipeline import pipeline
from dtron.tree import flat
from tests.helpers.hf_models import folder
from tests.helpers.same_step import model_config
from tests.helpers.texts import one_line

BF16, F32 = torch.bfloat16, torch.float32


def teaching(mesh: str, zero: int = 1) -> RunConfig:
    """A step with a teacher of another family and another width."""
    config = model_config(mesh, 2, zero=zero, batch=8, micro_batch=2)
    loss = LossConfig(name="distillation", teacher=str(folder("llama")))
    return replace(config, loss=loss, model=replace(config.model, vocab=61, layers=2))


def held(config: RunConfig) -> list[int]:
    """The bytes that the first rank of each pipeline rank has, of the second model of a run."""
    shape = MeshShape.parse(config.mesh)
    plan = plan_of(config, shape, BF16)
    with simulated(shape) as mesh:
        layout = Layout(mesh, rules_for(config.zero), compute=BF16)
        pipe = pipeline(config, shape, plan.count, config.data.seq_len, layout)
        model = second_model(config, plan, pipe, None)
        assert model is not None
        found = [0 for _ in pipe.table.rows]
        for stage, tree in zip(pipe.stages, model.weights or (), strict=bool(model.weights)):
            shards = [getattr(to_local(w), "_local_tensors", {0: w})[0] for w in flat(tree)]
            found[pipe.table.rank_of[stage]] += sum(x.nbytes for x in shards)
        return found


def counted(config: RunConfig) -> list[int]:
    shape = MeshShape.parse(config.mesh)
    return second_model_bytes(config, shape, make("1f1b", shape.pp, 4), BF16, F32)


def same_bytes(mesh: str, zero: int) -> None:
    config = teaching(mesh, zero)
    want = counted(config)
    assert held(config) == want and min(want) > 0
    planned = plan_ranks(config, plan_of(config, MeshShape.parse(config.mesh), BF16))
    for rank, nbytes in zip(planned, want, strict=True):  # an allocation is rounded up
        assert nbytes <= rank.state[SECOND] <= nbytes + 512 * 30


@pytest.mark.parametrize(("mesh", "zero"), [("dp=2,tp=2", 3), ("pp=2,dp=2", 1)])
def test_the_bytes_are_those_of_the_weights(mesh, zero):
    same_bytes(mesh, zero)


def test_bytes_of_another_placement_are_caught(monkeypatch):
    """Mutant: the weights are counted as if nothing sharded them over dp."""
    monkeypatch.setattr("dtron.runtime.second_memory.rules_for", lambda zero: rules_for(0))
    assert_caught(lambda: same_bytes("dp=2", 1))


def test_a_frozen_base_takes_no_more():
    config = replace(
        model_config("dp=2", 2, batch=8, micro_batch=2),
        loss=LossConfig(name="dpo"),
        lora=LoraConfig(rank=2),
        data=DataConfig(seq_len=32, document_mask=True),
    )
    assert counted(config) == held(config) == [0]
    assert counted(replace(config, lora=LoraConfig()))[0] > 0


FLAGS = ["--loss.name", "distillation", "--loss.teacher"]


def test_show_and_plan_have_a_row(capsys):
    """And a plan of a step with a reference ends."""
    model = ["--model.vocab", "61", "--model.layers", "2", "--mesh", "dp=2"]
    model += ["--model.vocab-multiple", str(teaching("dp=2").model.vocab_multiple)]
    assert show.main([*model, *FLAGS, str(folder("llama"))]) == 0
    want = counted(teaching("dp=2"))[0]
    assert f"{size(want)} of it for the teacher" in capsys.readouterr().out
    one_line(lambda: show.main([*model, *FLAGS[:2]]), "give its folder by --loss.teacher")
    flags = ["--loss.name=dpo", "--data.kind=preference", "--data.path=x.jsonl", "--batch=2"]
    found = plan_config(parse([*model, "--model.layers=1", "--data.seq-len=32", *flags]))
    assert SECOND in [column.header for column in memory_table(found).columns]
    assert found.ranks[0].peak[SECOND] == found.ranks[0].state[SECOND] > 0


def test_a_run_without_room_for_its_teacher_is_refused(monkeypatch):
    """A model that fits, and its teacher that does not."""
    model = ["--simulate", "--mesh=dp=1", "--model.vocab=61", "--model.layers=1"]
    model += ["--model.embed=16", "--model.mlp=16", "--model.heads=2", "--model.kv-heads=2"]
    model += ["--data.seq-len=32", "--model.context=32"]
    monkeypatch.setattr(check_memory, "_host_memory", lambda: 200_000)
    plan_run(parse(model))
    config = parse([*model, *FLAGS, str(folder("llama"))])
    one_line(lambda: plan_run(config), "and the second model", "which has 0 GiB")
