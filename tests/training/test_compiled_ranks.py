"""Compiled stages on several ranks: the losses of eager stages, and the same collectives."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import pytest
import torch

from dtron.distributed.redistribute import full
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.compute_config import ComputeConfig
from dtron.params import init
from dtron.rules import rules_for
from dtron.training.compiled_stage import compiled
from dtron.training.gradients import gradients
from dtron.training.optimizer import apply_update, init_state
from dtron.training.pipeline import one_stage, program
from dtron.training.update_scalars import UpdateScalars
from dtron.tree import flat
from tests.helpers.compiled import BLOCK, DOCUMENTS, HARD, ONE, ROWS, lone_rank
from tests.helpers.real_mesh import real_mesh
from tests.helpers.values import ADAMW, flex_on_cpu

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def steps_on_pool(
    mesh: str,
    zero: int,
    backend: str | None,
    path: str = "auto",
    cp: str = "ring",
    recompute: str = "none",
    budget: float | None = None,
) -> list[float]:
    """A job for the pool: loss and gradient norms of three steps.

    ``backend``: compiles the stage; None is eager.
    ``path``: an attention kernel. If it is given, the mask has every feature.
    Weights are cast where they are gathered, and gradients where they are reduced."""
    torch.compiler.reset()  # otherwise earlier jobs would count as recompilations
    m = BLOCK if path == "auto" else HARD
    layout = Layout(real_mesh(mesh), rules_for(zero), compute=torch.float32)
    pipe = one_stage(m, 2, layout)
    how = ComputeConfig(recompute, budget, path, cp_method=cp)
    functions = program(m, layout, how, splits=False)
    functions = compiled(functions, layout, how, backend) if backend else functions
    params = init(pipe.spec, m.dims(), 0, layout, torch.float64)
    opt, found = init_state(ADAMW, pipe.spec, params), []
    with (
        flex_on_cpu() if path == "flex" else nullcontext()
    ):  # flex_on_cpu resets the compiler at its end
        for _ in range(3):
            documents = [None, None] if path == "auto" else DOCUMENTS.chunk(2)
            batches = [
                make_batch(r, layout, d) for r, d in zip(ROWS.chunk(2), documents, strict=True)
            ]
            loss, grads, _ = gradients(functions, params, batches, 64, pipe, zero)
            found += [full(loss).item(), *(full(g).norm().item() for g in flat(grads))]
            scalars = UpdateScalars(1e-2, 1 / 64)
            params, opt = apply_update(ADAMW, pipe.spec, params, grads, opt, scalars, layout)
    return found


@cache
def eager_on_pool(pool, *how) -> list[list[float]]:
    """Results of eager stages, for several tests."""
    return pool.run(steps_on_pool, *how)


@pytest.mark.xdist_group("pool")
@pytest.mark.parametrize(
    ("mesh", "zero"),
    [
        pytest.param("dp=2,tp=2", 1, marks=pytest.mark.slow),
        ("dp=2", 1),  # where small weights share a gather
        pytest.param("dp=2,tp=2", 2, marks=pytest.mark.slow),
        ("dp=2,tp=2", 3),
        ("dp_replicate=2,dp=2", 3),
        pytest.param("tp=4", 1, marks=pytest.mark.slow),
    ],
)
def test_sharded_stages_compile_too(request, mesh, zero):
    """The trace has DTensors. Local kernels and collectives are opaque to it. All on real ranks.
    The tracer looks at the backward of a custom function before it knows the placement of
    gradients. A function that decides there by the placement that it sees forgets to sum the
    gradients."""
    pool = request.getfixturevalue("pair" if mesh == "dp=2" else "pool")
    want = eager_on_pool(pool, mesh, zero, None)
    got = pool.run(steps_on_pool, mesh, zero, "aot_eager")
    assert got[0] == pytest.approx(want[0], rel=1e-4) and want[0] == pytest.approx(
        want[-1], rel=1e-12
    )


@pytest.mark.xdist_group("pool")
def test_a_budget_holds_on_several_ranks(pair):
    """The partitioner of torch 2.13 counts kept bytes, and does not know the size of a process
    group. So no group may be in the graph, as it is in a graph of ``torch.compile``."""
    how = "aot_eager_decomp_partition", "auto", "ring", "budget", 0.5
    got = pair.run(steps_on_pool, "dp=2", 3, *how)[0]
    assert got == pytest.approx(eager_on_pool(pair, "dp=2", 3, None)[0], rel=1e-4)


def collectives(mesh: str, zero: int, backend: str | None) -> dict[str, int]:
    """Count the collectives of each kind in one step, by the profiler."""
    torch.compiler.reset()
    layout = Layout(lone_rank(mesh), rules_for(zero), compute=torch.float32)
    pipe = one_stage(BLOCK, 1, layout)
    functions = program(BLOCK, layout, splits=False)
    functions = compiled(functions, layout, backend=backend) if backend else functions
    params = init(pipe.spec, BLOCK.dims(), 0, layout, torch.float64)
    step = lambda: gradients(functions, params, [make_batch(ROWS, layout)], 128, pipe, zero)
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p:
        step()
    kinds = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")
    kinds = (*kinds, "all_gather_into_tensor_coalesced")
    found = {
        e.key.partition("::")[2]: e.count for e in p.key_averages() if "c10d_functional::" in e.key
    }
    return {kind: found.get(kind, 0) for kind in kinds}


def test_a_compiled_step_communicates_what_an_eager_one_does():
    want, got = (collectives("tp=4", 1, backend) for backend in (None, "aot_eager"))
    want.pop("all_gather_into_tensor_coalesced"), got.pop("all_gather_into_tensor_coalesced")
    assert got == want and all(want.values())


@pytest.mark.xdist_group("pool")
@pytest.mark.parametrize(
    ("cp", "path"),
    [
        ("ring", "auto"),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in (("ring", "reference"), ("ulysses", "auto"), ("allgather", "auto"))
        ),
    ],
)
def test_attention_over_cp_compiles(request, cp, path):
    """With its collectives, in one graph; those of backward too. If a compiler takes the gradients
    of a custom function for zero, or for the rank's own, the next loss differs."""
    mesh = "cp=2" if path == "auto" else "cp=4"
    pool = request.getfixturevalue("pair" if path == "auto" else "pool")
    want = pool.run(steps_on_pool, mesh, 3, None, path, cp)
    got = pool.run(steps_on_pool, mesh, 3, "aot_eager", path, cp)
    assert got[0] == pytest.approx(want[0], rel=1e-4) and want[0] == pytest.approx(
        want[-1], rel=1e-12
    )


def test_compiled_units_gather_their_weights_and_blocks_gather_again():
    """Under ZeRO-3 the block gathers its weights in one collective, and again in backward. The
    vocabulary has unequal shards, so the embedding and the head are gathered by themselves. ZeRO-2
    gathers all weights once a step."""
    two, three = (collectives("dp=2,tp=2", zero, "aot_eager") for zero in (2, 3))
    matrices = sum(w.decays for w in flat(one_stage(BLOCK, 1, ONE).spec[0]))
    together, none = "all_gather_into_tensor_coalesced", 0
    assert three.pop(together) == 2 and two.pop(together) == none
    blocks = matrices - 2
    assert two.pop("all_gather_into_tensor") - three.pop("all_gather_into_tensor") == blocks
    assert three == two


@pytest.mark.xdist_group("pool")
def test_flex_in_sharded_stages(pair):
    """Each rank computes the block mask of its own documents, outside of what ZeRO-3 recomputes."""
    want = pair.run(steps_on_pool, "dp=2", 3, None, "reference")
    got = pair.run(steps_on_pool, "dp=2", 3, "aot_eager", "flex")
    assert got[0] == pytest.approx(want[0], rel=1e-4)
