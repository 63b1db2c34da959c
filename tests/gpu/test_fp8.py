"""FP8 on a GPU that has it: real kernels against float64. ``pytest -m gpu``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from dtron.distributed.mesh_shape import MeshShape
from dtron.fp8.__main__ import error, products
from dtron.fp8.matmul import compile_options, grouped_matmul
from dtron.fp8.recipes import RECIPES
from dtron.mesh import Layout
from dtron.runtime.config import DataConfig, RunConfig
from tests.fp8.test_experts import all_of
from tests.fp8.test_experts import operands as grouped_operands
from tests.gpu.test_training import losses
from tests.helpers.products import ERRORS, NAMES, converted, operands
from tests.helpers.runs import MODEL, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="no FP8 here",
    ),
]


def on_gpu(*sizes: int, dtype: torch.dtype = torch.bfloat16):
    return [x.cuda() for x in operands(*sizes, dtype=dtype)]


def compiled(fn, name: str):
    torch.compiler.reset()
    return torch.compile(fn, fullgraph=True, dynamic=False, options=compile_options(RECIPES[name]))


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    "sizes", [(256, 256, 256), (4096, 1024, 512), (512, 4096, 2048), (4096, 4096, 4096)]
)
@pytest.mark.parametrize("name", NAMES)
def test_errors_are_those_of_the_recipe(name, sizes, compile):
    xs = on_gpu(*sizes)
    fn = compiled(converted(name), name) if compile else converted(name)
    want, got = products(torch.matmul, *(x.double() for x in xs)), products(fn, *xs)
    for a, b, like, expected in zip(got, want, (xs[2], *xs[:2]), ERRORS[name], strict=True):
        assert a.dtype == torch.bfloat16 and a.stride() == like.stride()
        assert 0.5 * expected < error(a, b) < 1.3 * expected


@pytest.mark.parametrize("name", NAMES)
def test_kernels_are_what_the_cpu_imitates(name):
    """Fast accumulation keeps fewer bits of a sum than float32."""
    for dtype in (torch.bfloat16, torch.float32):
        got = products(converted(name), *on_gpu(512, 1024, 768, dtype=dtype))
        want = products(converted(name), *operands(512, 1024, 768, dtype=dtype))
        assert all(error(a.cpu(), b) < 5e-3 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_compiled_is_eager_where_it_is_fused_with_what_is_around(name):
    fn = lambda x, w: torch.nn.functional.silu(converted(name)(x * 3, w))
    xs = on_gpu(512, 1024, 768)
    got, want = products(compiled(fn, name), *xs), products(fn, *xs)
    assert all(a.isfinite().all() and error(a, b) < 5e-3 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("counts", [[100, 0, 37, 300], [64, 64, 64, 64]])
def test_products_of_experts_are_what_the_cpu_imitates(counts, compile):
    x, w, ends_E, dy = grouped_operands(counts, inner=256, outer=384, rest=11)
    torch.compiler.reset()
    fn = partial(grouped_matmul, recipe=replace(RECIPES["rowwise"], min_weights=0))
    there = torch.compile(fn, fullgraph=True, dynamic=False) if compile else fn
    xs = [t.detach().bfloat16().requires_grad_() for t in (x, w)]
    of = lambda fn, xs, ends_E, dy: all_of(fn, *xs, ends_E, dy)
    want = of(fn, xs, ends_E, dy.bfloat16())
    got = of(
        there, [t.detach().cuda().requires_grad_() for t in xs], ends_E.cuda(), dy.bfloat16().cuda()
    )
    for a, b in zip(got, want, strict=True):
        a, b = (
            t[: sum(counts)] if len(t) == len(x) else t for t in (a.cpu(), b)
        )  # other rows have any value
        assert b.abs().max() > 0 and error(a, b) < 5e-3


@pytest.mark.parametrize("name", NAMES)
def test_an_odd_number_of_tokens_is_a_plain_product(name):
    """The kernels would refuse the shape, and only in backward."""
    xs = on_gpu(4104, 256, 256)
    pairs = zip(products(converted(name), *xs), products(torch.matmul, *xs), strict=True)
    assert all(a.equal(b) for a, b in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_ten_steps_follow_bfloat16(name):
    """The mean agrees. A small model learns fast, and single steps differ by up to 4 %.
    docs/performance.md has 200 steps of a larger model."""
    model = replace(MODEL, embed=128, head_dim=32, mlp=128)
    config = RunConfig(model=model, data=DataConfig(seq_len=16), batch=8, steps=10, seed=3)
    in_fp8 = replace(config, fp8=name, fp8_first_last=True, fp8_min_weights=0)
    want, got = (
        train(Layout(compute=torch.bfloat16), MeshShape(), c, device="cuda").losses
        for c in (config, in_fp8)
    )
    assert sum(got) == pytest.approx(sum(want), rel=1e-2) and got != want


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU per rank")
@pytest.mark.parametrize("engines", ["auto", "off"])
def test_two_gpus_gather_in_8_bits(tmp_path, engines):
    """The losses are those of a gather in bfloat16, compiled and in a CUDA graph."""
    flags = ["--mesh", "dp=2", "--zero", "3", "--copy-engines", engines, "--model.layers", "2"]
    fp8 = ["--fp8", "tensorwise", "--fp8-first-last", "--fp8-min-weights", "0"]
    want, got = (
        losses(tmp_path / name, *flags, *fp8, *more, processes=2, dtype="bfloat16")
        for name, more in (("wide", []), ("narrow", ["--fp8-gather"]))
    )
    assert got == pytest.approx(want, rel=2e-3)
