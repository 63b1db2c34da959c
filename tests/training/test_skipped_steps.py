"""``--optim.skip-grad-norm``: a step with a larger gradient norm changes nothing.

The step is reported."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dtron.distributed.mesh_shape import MeshShape
from dtron.mesh import Layout
from dtron.runtime.config import DataConfig, OptimConfig, RunConfig
from dtron.runtime.fault_tolerance import NonFiniteGuard
from tests.helpers.runs import MODEL, simulate, train
from tests.helpers.texts import one_line
from tests.helpers.values import F64

CONFIG = RunConfig(model=MODEL, data=DataConfig(seq_len=16), batch=8, steps=4, seed=3)


def limited(norm: float, **changes) -> RunConfig:
    return replace(CONFIG, optim=OptimConfig(skip_grad_norm=norm), **changes)


@pytest.mark.parametrize("mesh", ["", "dp=2,tp=2"])
def test_a_step_above_the_limit_changes_nothing(mesh):
    """The rows of step 4 are those of step 1. Between the norms of the first two steps, a limit
    skips the larger one."""
    run = lambda c: simulate(mesh, c, F64) if mesh else train(Layout(), MeshShape(), c, F64)
    usual = run(CONFIG)
    all_skipped = run(limited(1e-9))
    assert all_skipped.losses[3] == pytest.approx(all_skipped.losses[0], rel=1e-12)
    assert all_skipped.norms[3] == pytest.approx(all_skipped.norms[0], rel=1e-12)
    assert usual.losses[3] != pytest.approx(usual.losses[0], rel=1e-3)
    assert run(limited(1e9)).losses == usual.losses
    first, second = usual.norms[:2]
    one_skipped = run(limited((first + second) / 2))
    assert one_skipped.losses[0] == usual.losses[0] and one_skipped.losses != usual.losses
    assert (one_skipped.losses[1] == usual.losses[1]) == (first < second)


def test_it_is_reported_and_ends_a_run_that_always_skips():
    guard = NonFiniteGuard(2, 5.0)
    assert guard.note(1, 3.0, 4.9) is None
    assert guard.note(2, 3.0, 7.25) == (
        "warning: step 2: the gradient norm is 7.25, above 5; skipped, 1 in a row"
    )
    assert not guard.over and guard.skipped_steps == 1
    guard.note(3, 3.0, 8.0)
    assert guard.over and guard.reason == "2 steps in a row were skipped"
    assert NonFiniteGuard(2).note(1, 3.0, 1e30) is None


def test_a_limit_below_zero_is_refused():
    one_line(lambda: OptimConfig(skip_grad_norm=-1.0), "optim.skip_grad_norm=-1.0", "from 0")
