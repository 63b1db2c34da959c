"""Compiled blocks whose activations move to the host have the gradients of blocks that keep them,
to the bit. On real ranks too, where ZeRO-3 gathers the weights of compiled units ahead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from dtron.distributed.host_memory import HostMemory
from dtron.distributed.redistribute import full
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.compute_config import ComputeConfig
from dtron.model.mtp import MTPConfig
from dtron.moe.config import MoEConfig
from dtron.params import init
from dtron.rules import rules_for
from dtron.testing import assert_caught
from dtron.training.compiled_stage import compiled
from dtron.training.gradients import gradients
from dtron.training.pipeline import one_stage, program
from dtron.tree import flat
from tests.helpers.compiled import ONE, ROWS
from tests.helpers.offloading import buffers_given_back_too_early, everything_moves
from tests.helpers.real_mesh import real_mesh
from tests.helpers.runs import MODEL

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def results(layout: Layout, how: ComputeConfig, backend: str | None, zero: int, **change: Any):
    """The loss and the gradients of two steps of two microbatches, on this rank."""
    m = replace(MODEL, layers=3, **change)
    pipe = one_stage(m, 2, layout)
    functions = program(m, layout, how, splits=False)
    functions = compiled(functions, layout, how, backend) if backend else functions
    params = init(pipe.spec, m.dims(), 0, layout)
    batches = [make_batch(rows, layout, depth=m.mtp.depth) for rows in ROWS.chunk(2)]
    found = []
    for _ in range(2):
        loss, grads, _ = gradients(functions, params, batches, 64, pipe, zero)
        found += [full(x).detach().clone() for x in (loss, *flat(grads))]
    return found


def assert_moves_change_nothing(
    layout: Layout, backend: str | None, zero: int = 1, **change: Any
) -> None:
    """Compare with a stage that keeps everything. Of three blocks, two move in two microbatches."""
    how, moves = ComputeConfig(moe_dispatch="static"), []
    copy_out = HostMemory.copy_out

    def noted(self: HostMemory, pairs: Any) -> Any:
        moves.append(sum(x.nbytes for x, _ in pairs))
        return copy_out(self, pairs)

    want = results(layout, how, backend, zero, **change)
    with everything_moves(), mock.patch.object(HostMemory, "copy_out", noted):
        got = results(layout, replace(how, recompute="offload"), backend, zero, **change)
    blocks = 2 + change.get("mtp", MTPConfig()).depth
    assert len(moves) == 2 * 2 * blocks and min(moves) > 10_000
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("backend", "change"),
    [
        ("aot_eager", {}),
        pytest.param("inductor", {}, marks=pytest.mark.slow),  # compiles C++ for 15 seconds
        ("aot_eager", {"moe": MoEConfig(experts=4, top_k=2, mlp=16)}),
        ("aot_eager", {"mtp": MTPConfig(depth=1)}),
    ],
)
def test_a_compiled_stage_to_the_bit(backend, change):
    assert_moves_change_nothing(ONE, backend, **change)


def test_blocks_that_move_and_the_last_one_share_a_graph():
    how = ComputeConfig("offload")
    functions = compiled(program(replace(MODEL, layers=3), ONE, how), ONE, how, "aot_eager")
    pipe = one_stage(replace(MODEL, layers=3), 1, ONE)
    params = init(pipe.spec, replace(MODEL, layers=3).dims(), 0, ONE)
    gradients(functions, params, [make_batch(ROWS, ONE)], 64, pipe, 1)
    assert len(functions.stage.keywords["call"].kinds) == 2  # the block, and the loss


def test_a_buffer_that_is_used_too_early_is_caught():
    with buffers_given_back_too_early():
        assert_caught(lambda: assert_moves_change_nothing(ONE, "aot_eager"))


def moves_on_pool(mesh: str, zero: int, backend: str | None) -> None:
    """A job for the pool."""
    torch.compiler.reset()
    rules, compute = rules_for(zero), torch.bfloat16
    layout = Layout(real_mesh(mesh), rules, compute=compute)
    assert_moves_change_nothing(layout, backend, zero)


@pytest.mark.xdist_group("pool")
@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize(
    ("mesh", "zero"), [("dp=2", 3), pytest.param("cp=2", 1, marks=pytest.mark.slow)]
)
def test_real_ranks_to_the_bit(pair, mesh, zero, backend):
    pair.run(moves_on_pool, mesh, zero, backend)
