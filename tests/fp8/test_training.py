"""FP8 in a model: compiled, recomputed, pipelined, on a mesh; and what is refused."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full
from dtron.fp8.matmul import compile_options, matmul
from dtron.fp8.recipes import RECIPES
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.compute_config import ComputeConfig
from dtron.params import init
from dtron.rules import rules_for
from dtron.runtime.config import DataConfig, PipelineConfig, RunConfig
from dtron.runtime.launch import plan_run
from dtron.training.compiled_stage import compiled
from dtron.training.grad_norm import global_norm
from dtron.training.gradients import gradients
from dtron.training.pipeline import one_stage, program
from dtron.tree import flat
from tests.helpers.products import NAMES
from tests.helpers.real_mesh import real_mesh
from tests.helpers.runs import MODEL, on_pool, simulate, train

SIZES = replace(MODEL, embed=32, head_dim=8, mlp=64)
PLAIN = RunConfig(
    model=SIZES, data=DataConfig(seq_len=16), batch=8, micro_batch=1, steps=10, seed=3
)
FP8 = replace(PLAIN, fp8="rowwise", fp8_first_last=True, fp8_min_weights=0)


def losses(config: RunConfig, stages: int = 1) -> list[float]:
    return train(Layout(), MeshShape(pp=stages), config).losses


@pytest.mark.parametrize("name", NAMES)
def test_ten_steps_follow_high_precision(name):
    """At a high learning rate, with matmuls of 32 summands in three bits, the losses agree within 2
    %. Recipes with blocks need width 128; a model of that width learns so fast that only the mean
    agrees."""
    change, over = {}, lambda found: found
    if name == "blockwise":
        change, over = (
            {"model": replace(SIZES, embed=128, head_dim=32, mlp=128), "micro_batch": 8},
            sum,
        )
    want, got = losses(replace(PLAIN, **change)), losses(replace(FP8, fp8=name, **change))
    assert over(got) == pytest.approx(over(want), rel=2e-2) and got != want
    assert got[-1] < got[0] - 0.3


def test_the_first_and_the_last_block_are_left_out():
    two = replace(FP8, steps=2)
    assert (
        losses(replace(two, fp8_first_last=False))
        == losses(replace(two, fp8="none"))
        != losses(two)
    )
    three = replace(two, model=replace(SIZES, layers=3))
    assert (
        len(
            {
                losses(replace(three, **c))[0]
                for c in ({"fp8": "none"}, {"fp8_first_last": False}, {})
            }
        )
        == 3
    )


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_blocks_round_the_same_way(recompute):
    assert losses(replace(FP8, recompute=recompute, steps=3)) == losses(replace(FP8, steps=3))


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_a_pipeline_rounds_the_same_way(schedule):
    config = replace(FP8, steps=3)
    got = losses(replace(config, pipeline=PipelineConfig(schedule)), stages=2)
    assert got == pytest.approx(losses(config), rel=1e-5)


@pytest.mark.parametrize(("mesh", "zero"), [("dp=2,tp=2", 3), ("tp=2", 1)])
def test_a_mesh_follows_one_device(mesh, zero):
    """The bound is above float32's rounding: a sum in another order may round to the neighbouring
    FP8 value."""
    config = replace(FP8, fp8="tensorwise", zero=zero, micro_batch=2, steps=3)
    want = losses(config)
    assert simulate(mesh, config).losses == pytest.approx(want, rel=1e-4)
    assert losses(replace(config, fp8="none")) != pytest.approx(want, rel=1e-4)


@pytest.mark.xdist_group("pool")
def test_real_ranks_do_what_simulated_ones_do(pool):
    config = replace(FP8, zero=3, micro_batch=2, steps=3)
    want, got = simulate("dp=2,tp=2", config), pool.run(on_pool, "dp=2,tp=2", config)
    assert got[0][0] == pytest.approx(want.losses, rel=1e-5) and got[0] == got[3]


ONE, TOKENS = Layout(), torch.arange(4 * 17).view(4, 17) % 61


BLOCK = replace(SIZES, layers=1)  # for compiled stages: compiling takes seconds a layer


def step(functions, layout: Layout = ONE, zero: int = 1):
    """``(loss, gradients, spec)`` of two microbatches."""
    pipe = one_stage(BLOCK, 2, layout)
    params = init(pipe.spec, BLOCK.dims(), 0, layout, torch.float32)
    batches = [make_batch(r, layout) for r in TOKENS.chunk(2)]
    return *gradients(functions, params, batches, 64, pipe, zero)[:2], pipe.spec


@pytest.mark.parametrize(
    ("name", "recompute"),
    [
        *((n, "none") for n in NAMES if n != "blockwise"),
        ("rowwise", "full"),
        ("rowwise", "selective"),
    ],
)
def test_compiled_gradients_are_those_of_eager(name, recompute):
    """The stage is one graph."""
    torch.compiler.reset()
    how = ComputeConfig(recompute, fp8=name, fp8_first_last=True, fp8_min_weights=0)
    want_loss, want, _ = step(program(BLOCK, ONE, how))
    got_loss, got, _ = step(compiled(program(BLOCK, ONE, how), ONE, how, "aot_eager"))
    assert got_loss.item() == pytest.approx(want_loss.item(), rel=1e-5)
    for a, b in zip(flat(got), flat(want), strict=True):
        assert a.abs().max() > 0 and (a - b).norm() < 1e-3 * b.norm()


def norms_on_pool(
    mesh: str, zero: int, backend: str | None, how: ComputeConfig = FP8.how
) -> list[float]:
    """A job for the pool: loss and gradient norm of a step."""
    layout = Layout(real_mesh(mesh), rules_for(zero))
    functions = program(BLOCK, layout, how, splits=False)
    loss, grads, spec = step(
        compiled(functions, layout, how, backend) if backend else functions, layout, zero
    )
    return [full(loss).item(), global_norm(grads, spec).item()]


@pytest.mark.xdist_group("pool")
@pytest.mark.parametrize(
    ("mesh", "zero"), [("tp=2", 1), pytest.param("dp=2,tp=2", 3, marks=pytest.mark.slow)]
)
def test_sharded_stages_compile_too(request, mesh, zero):
    """Local regions are part of the graph. For ZeRO-3 see fp8/test_fp8_all_gather.py."""
    pool = request.getfixturevalue("pair" if mesh == "tp=2" else "pool")
    want = pool.run(norms_on_pool, mesh, zero, None)
    got = pool.run(norms_on_pool, mesh, zero, "aot_eager")
    assert got[0] == pytest.approx(want[0], rel=1e-5) and want[0] == pytest.approx(
        want[-1], rel=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_inductor_gives_the_bits_of_eager(name):
    """The matmul alone. torch 2.11 on a CPU does not heed the option that rounds fused operations
    as eager does; tests/gpu/test_fp8.py tests the option. Needs a C++ compiler."""
    recipe, g = replace(RECIPES[name], min_weights=0), torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(shape, generator=g).bfloat16().requires_grad_()
    x, w, fn = make(128, 256), make(256, 128), lambda x, w: matmul(x, w, recipe)
    both = []
    for f in (fn, torch.compile(fn, fullgraph=True, options=compile_options(recipe))):
        y = f(x, w)
        both.append((y, *torch.autograd.grad(y, (x, w), y.detach())))
    assert all(a.abs().max() > 0 and a.equal(b) for a, b in zip(*both, strict=True))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"fp8_min_weights": 2**24},
            "--fp8 rowwise: no matrix of this model has 16777216 weights.*at most 2048.*drop",
        ),
        ({"data": DataConfig(seq_len=8)}, "the 8 tokens multiples of 16"),
        ({"fp8_first_last": False}, "model.layers=2.*use --fp8-first-last"),
        ({"dtype": "float64"}, "--fp8 rowwise --dtype float64.*drop one"),
    ],
)
def test_refused_at_the_edge(changes, says):
    plan_run(replace(FP8, device="cpu"))
    with pytest.raises(ValueError, match=says):
        plan_run(replace(FP8, device="cpu", **changes))


def test_a_negative_size_is_refused():
    with pytest.raises(ValueError, match="--fp8-min-weights -1"):
        replace(FP8, fp8_min_weights=-1)


def test_without_torchao_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8.config", None)
    monkeypatch.delitem(sys.modules, "dtron.fp8.scaled_mm", raising=False)
    with pytest.raises(
        ValueError, match=r"--fp8 rowwise: needs torchao.*pip install 'dtron\[fp8\]'"
    ):
        plan_run(replace(FP8, device="cpu"))
    plan_run(replace(PLAIN, device="cpu"))


def test_torchao_is_imported_late_and_quietly():
    program = """
import logging, os, sys
import dtron.runtime.launch
assert "torchao" not in sys.modules
before = dict(os.environ), logging.getLogger("torchao").level
import dtron.fp8.scaled_mm
assert "torchao" in sys.modules and before == (dict(os.environ), logging.getLogger("torchao").level)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
