"""Steps whose loss or gradient is not finite: nothing moves, and the diagnosis names the weight."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import to_local
from dtron.distributed.simulated_ranks import by_rank, simulated
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.params import init
from dtron.rules import rules_for
from dtron.runtime.config import RunConfig
from dtron.runtime.exit import run_cli
from dtron.runtime.fault_tolerance import NonFiniteGuard, diagnose
from dtron.runtime.launch import host_group
from dtron.training.optimizer import init_state
from dtron.training.pipeline import one_stage, program
from dtron.training.step import TrainStep
from dtron.tree import flat
from tests.helpers.runs import MODEL, on_pool, random_rows
from tests.helpers.train_cli import TINY, records
from tests.helpers.values import ADAMW
from tests.training.test_steps import TEN


def steps_of(optimizer, spoil: int | None) -> list[torch.Tensor]:
    """Weights and optimizer state after each of three updates. The loss of update ``spoil`` is
    NaN."""
    layout, found = Layout(), []
    pipe = one_stage(MODEL, 2, layout)
    params = init(pipe.spec, MODEL.dims(), 0, layout)
    opt, functions = init_state(optimizer, pipe.spec, params), program(MODEL, layout)
    spoiled = replace(functions, stage=lambda *a: (functions.stage(*a)[0] * math.nan, None))
    for number in range(3):
        batches = [make_batch(r, layout) for r in random_rows(TEN, number).chunk(2)]
        fn = spoiled if number == spoil else functions
        step = TrainStep(fn, pipe, RunConfig(model=MODEL), optimizer)
        loss, norm, _, params, opt = step(params, opt, batches, 64, 1e-2)
        assert loss.isfinite().item() == (number != spoil)
        found.append([x.clone() for tree in (params, *opt.trees.values()) for x in flat(tree)])
    assert opt.step == 3
    return found


@pytest.mark.parametrize("compile", [False, True])
def test_a_step_that_is_not_finite_moves_nothing(compile):
    first, second, third = steps_of(ADAMW.compiled("aot_eager") if compile else ADAMW, 1)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))
    assert not any(a.equal(b) for a, b in zip(second, third, strict=True))
    assert all(x.isfinite().all() for x in third)


@pytest.mark.parametrize(
    ("where", "mesh"),
    [
        *(("weight", mesh) for mesh in ("dp=1", "tp=2", "dp=2,tp=2")),
        *(("gradient", mesh) for mesh in ("dp=1", "tp=2")),
        pytest.param("gradient", "dp=2,tp=2", marks=pytest.mark.slow),
    ],
)
def test_the_diagnosis_names_weight_rank_and_microbatch(mesh, where):
    shape = MeshShape.parse(mesh)
    with simulated(shape) as device_mesh:
        layout = Layout(device_mesh, rules_for(1))
        pipe = one_stage(MODEL, 2, layout)
        params = init(pipe.spec, MODEL.dims(), 0, layout)
        functions, rank = program(MODEL, layout), shape.size - 1
        batches = [make_batch(r, layout) for r in random_rows(TEN, 0).chunk(2)]
        if where == "weight":
            w = params[0].blocks[1].mlp.w_up
            by_rank(w.to_local() if hasattr(w, "to_local") else w, 0)[rank][0, 0] = math.inf
            want = f"blocks.1.mlp.w_up itself is not finite on rank {rank} (1 in all)"
        else:
            plain = functions.stage

            def spoilt(p, x, batch):
                return (
                    plain(p, x, batch)[0] * (math.nan if batch is batches[1] else 1.0),
                    None,
                )

            functions = replace(functions, stage=spoilt)
            want = "the gradient of w_head is not finite on rank"
        said = diagnose(TrainStep(functions, pipe, TEN, ADAMW), params, batches)
        assert want in said
        assert where == "weight" or "in microbatch 1 " in said
        if where == "gradient":
            clean = diagnose(TrainStep(program(MODEL, layout), pipe, TEN, ADAMW), params, batches)
            assert "are finite" in clean


def diagnose_on_pool(mesh: str, config: RunConfig, spoilt: int) -> list[str]:
    """A job for the pool: the diagnosis on this rank, before and after a weight of one rank becomes
    infinite."""
    import torch.distributed as dist

    said = []

    def diagnosed(step):
        def run(params, opt, batches, *rest):
            group = host_group(20)  # seconds; by now all ranks have started
            said.append(diagnose(step, params, batches, group))
            if dist.get_rank() == spoilt:
                to_local(params[0].blocks[0].mlp.w_up)[0, 0] = math.inf
            said.append(diagnose(step, params, batches, group))
            return step(params, opt, batches, *rest)

        return run

    on_pool(mesh, config, change_step=diagnosed)
    return said


@pytest.mark.xdist_group("pool")
@pytest.mark.parametrize(("mesh", "zero", "block"), [("pp=4", 1, 2), ("dp=4", 3, 0)])
def test_a_weight_of_one_rank_is_named_by_all(pool, mesh, zero, block):
    """No rank begins a backward. There it would wait for the rank with the infinite weight."""
    config = replace(TEN, model=replace(TEN.model, layers=4), steps=1, zero=zero)
    for clean, found in pool.run(diagnose_on_pool, mesh, config, 2):
        assert "are finite" in clean
        assert f"blocks.{block}.mlp.w_up itself is not finite on rank 2 (1 in all)" in found


def test_a_run_that_comes_to_nothing_stops_and_says_why(run_dir, capsys):
    argv = [
        *TINY,
        f"--run-dir={run_dir}",
        "--optim.lr=1e30",
        "--steps=30",
        "--max-nonfinite-steps=3",
    ]
    assert run_cli(train.main, argv) == 2
    out, err = capsys.readouterr()
    assert "3 steps in a row were skipped; " in err and "--optim.lr" in err and err.count("\n") == 1
    assert "not finite; skipped, 1 in a row" in out
    assert records(run_dir)[-1]["skipped_steps"] >= 2 and records(run_dir)[-1]["grad_norm"] is None


@given(st.lists(st.floats(1.0, 1.2), min_size=25, max_size=60), st.floats(3.0, 9.0))
def test_a_spike_is_noticed_and_noise_is_not(usual, high):
    watch = NonFiniteGuard(3)
    assert not any(watch.note(i, x, 1.0) for i, x in enumerate([1.0, 1.1, 1.2] * 10))
    assert "jumped to" in watch.note(99, high, 1.0)
    assert watch.note(100, math.nan, 1.0) and watch.note(101, 1.0, math.inf)
    assert watch.skipped_steps == watch.in_a_row == 2 and not watch.over
    assert watch.note(102, 1.1, 1.0) is None and watch.in_a_row == 0
