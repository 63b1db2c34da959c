"""A feed-forward layer in chunks of tokens: the same result, and no tensor of ``[T, F]``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition as partition
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dtron.distributed.redistribute import full
from dtron.fp8.__main__ import error
from dtron.fp8.recipes import RECIPES
from dtron.layers.mlp import MLP, mlp
from dtron.layers.recompute import mlp_chunk_tokens
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.compute_config import ComputeConfig
from dtron.params import init
from dtron.rules import rules_for
from dtron.testing import (
    LayerCase,
    assert_caught,
    assert_equivalent,
    dropped,
    meshes,
    run_layer,
    unsummed,
    zero_stages,
)
from dtron.training.compiled_stage import compiled
from dtron.training.gradients import gradients
from dtron.training.pipeline import one_stage, program
from dtron.tree import flat
from tests.helpers.real_mesh import real_mesh
from tests.helpers.runs import MODEL
from tests.helpers.values import ONE, normal, tree

M = replace(MODEL, mlp=37)  # a width that no other tensor has
ROWS = torch.arange(8 * 17).view(8, 17) % 61
BLOCK = replace(MODEL, layers=1)
TOKENS, CHUNK = 8 * 16, 32


def layer(activation: str, chunk: int | None):
    return lambda p, x_TD, layout: mlp(p, x_TD, layout, activation, chunk=chunk)


def dims(activation: str, bias: bool = False) -> dict:
    return {"embed": 12, "mlp": 24, "gated": activation in ("swiglu", "geglu"), "bias": bias}


@settings(max_examples=15)
@given(
    activation=st.sampled_from(["swiglu", "geglu", "gelu", "relu2"]),
    bias=st.booleans(),
    mesh=meshes(),
    zero=zero_stages(),
    chunk=st.integers(1, 26),
)
def test_chunks_change_nothing(activation, bias, mesh, zero, chunk):
    """Output, every gradient and every collective, against all tokens at once, on one device and on
    the mesh. Of 24 tokens a chunk has one, or all and more, or leaves a remainder."""
    sizes, tolerance = dims(activation, bias), 1e-12
    chunked, whole = layer(activation, chunk), layer(activation, None)
    got = assert_equivalent(chunked, MLP, mesh, sizes, zero=zero)
    want = run_layer(LayerCase(whole, MLP, sizes, zero=zero), mesh)
    for name, x in want.tensors.items():
        torch.testing.assert_close(got.tensors[name], x, rtol=tolerance, atol=tolerance)
    assert got.total.count == want.total.count


@pytest.mark.parametrize("mutant", [unsummed, dropped(0), dropped(1)])
def test_mutants_are_caught(mutant):
    assert_caught(
        lambda: assert_equivalent(
            layer("swiglu", 5), MLP, "dp=2,tp=2", dims("swiglu"), mutate=mutant
        )
    )


def test_rows_that_are_left_out_are_caught():
    """A dropped last chunk, which is shorter, for example."""
    rest = Tensor.split
    with mock.patch.object(Tensor, "split", lambda x, n: [*rest(x, n)[:-1], rest(x, n)[-1] * 0]):
        got = run_layer(LayerCase(layer("gelu", 5), MLP, dims("gelu")), "dp=1").tensors["output"]
    want = run_layer(LayerCase(layer("gelu", None), MLP, dims("gelu")), "dp=1").tensors["output"]
    assert_caught(lambda: torch.testing.assert_close(got, want))


@pytest.mark.parametrize("name", ["tensorwise", "rowwise"])
def test_chunks_in_fp8(name):
    """Each chunk has its own scales, which are powers of two. It rounds as all tokens at once do,
    except for values near zero."""
    xs, p = normal(64, 32), tree(MLP, embed=32, mlp=48, gated=True)
    run = lambda chunk, recipe: mlp(p, xs, ONE, recipe=recipe, chunk=chunk)
    results = {}
    for chunk, recipe in ((None, None), (None, name), (32, name)):
        y = run(chunk, recipe and replace(RECIPES[recipe], min_weights=0))
        results[chunk, recipe] = [y, *torch.autograd.grad(y.square().sum(), [xs, *flat(p)])]
    exact, want, got = results.values()
    for a, b, c in zip(got, want, exact, strict=True):
        assert error(a, b) < 0.3 * error(b, c) < 0.1


def test_gradients_of_weights_are_added_up_in_float32():
    """A sum of 256 chunks in bfloat16 is worse than one matmul by far. A wider sum is no worse."""
    x, p = normal(512, 16), tree(MLP, embed=16, mlp=16, gated=True)
    slopes = lambda p, x, chunk: torch.autograd.grad(mlp(p, x, ONE, chunk=chunk).sum(), flat(p))
    narrow = MLP(
        *(w if w is None else w.detach().bfloat16().requires_grad_() for w in p.__dict__.values())
    )
    want = slopes(p, x, None)
    whole, chunked = (slopes(narrow, x.detach().bfloat16(), chunk) for chunk in (None, 2))
    for a, b, c in zip(chunked, whole, want, strict=True):
        assert a.dtype == torch.bfloat16 and error(a, c) < 1.5 * error(b, c) < 0.02


@contextmanager
def chunks_of(size: int | None) -> Iterator[None]:
    """The limit is lowered for models that are too small for chunks."""
    with mock.patch("dtron.model.block.mlp_chunk_tokens", lambda *_: size):
        yield


def step(functions, model=M) -> list[Tensor]:
    pipe = one_stage(model, 1, ONE)
    params = init(pipe.spec, model.dims(), 0, ONE, torch.float64)
    loss, grads, _ = gradients(functions, params, [make_batch(ROWS, ONE)], 128, pipe, 1)
    return [loss, *flat(grads)]


class Wide(TorchDispatchMode):
    """The most rows of any tensor between the matmuls of a feed-forward layer."""

    rows = 0

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        out = fn(*args, **kwargs or {})
        self.rows = max([self.rows, *(len(x) for x in tree_leaves(out) if is_wide(x))])
        return out


def is_wide(x: object) -> bool:
    return isinstance(x, Tensor) and x.ndim == 2 and x.shape[1] == M.mlp and x.shape[0] != M.embed


def test_an_eager_step_makes_nothing_wide():
    """In forward and in backward."""
    rows = []
    for chunk in (None, CHUNK):
        with chunks_of(chunk), Wide() as wide:
            step(program(M, ONE, ComputeConfig("full")))
        rows.append(wide.rows)
    assert rows == [TOKENS, CHUNK]


def peak(graph: torch.fx.GraphModule) -> int:
    """The most rows of wide tensors that are alive at once, in the order of the graph."""
    nodes = list(graph.graph.nodes)
    last = {used: i for i, node in enumerate(nodes) for used in node.all_input_nodes}
    alive, most = {}, 0
    for i, node in enumerate(nodes):
        if is_wide(x := node.meta.get("val")):
            alive[node] = len(x)
        most = max(most, sum(alive.values()))
        alive = {node: rows for node, rows in alive.items() if last.get(node, -1) > i}
    return most


@pytest.mark.parametrize("activation", ["swiglu", pytest.param("gelu", marks=pytest.mark.slow)])
def test_a_compiled_step_has_one_wide_chunk_at_work(activation):
    """In the graphs of forward and backward, a chunk needs at once what all tokens needed.
    Gradients are eager gradients."""
    m, peaks = replace(M, activation=activation), {}
    want = step(program(m, ONE), m)
    for chunk in (None, CHUNK):
        found = peaks[chunk] = []

        def note(graph, _, found=found):
            found.append(peak(graph))
            return make_boxed_func(graph.forward)

        torch.compiler.reset()
        backend = aot_autograd(fw_compiler=note, bw_compiler=note, partition_fn=partition)
        with chunks_of(chunk):
            got = step(compiled(program(m, ONE, ComputeConfig("full")), ONE, backend=backend), m)
        for a, b in zip(got, want, strict=True):
            assert a.abs().max() > 0
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    # The graphs of the block and of the loss, forward and backward. The loss has no wide tensor.
    assert peaks[CHUNK] == [n * CHUNK // TOKENS for n in peaks[None]]
    assert sum(n > 0 for n in peaks[CHUNK]) == 2


def step_on_pool(mesh: str, zero: int, chunk: int | None, backend: str | None) -> list[float]:
    """A job for the pool: a loss, and the norm of every gradient."""
    torch.compiler.reset()
    layout = Layout(real_mesh(mesh), rules_for(zero), compute=torch.float32)
    pipe = one_stage(BLOCK, 1, layout)
    functions = program(BLOCK, layout, ComputeConfig("full"), splits=False)
    functions = compiled(functions, layout, backend=backend) if backend else functions
    params = init(pipe.spec, BLOCK.dims(), 0, layout, torch.float64)
    with chunks_of(chunk):
        loss, grads, _ = gradients(functions, params, [make_batch(ROWS, layout)], 128, pipe, zero)
    return [full(loss).item(), *(full(g).norm().item() for g in flat(grads))]


@pytest.mark.slow
@pytest.mark.xdist_group("pool")
def test_chunks_compile_on_real_ranks(pool):
    """The region inside a recomputed block with gathered weights, eager and compiled."""
    whole, eager, fast = (
        pool.run(step_on_pool, "dp=2,tp=2", 3, *how)
        for how in ((None, None), (6, None), (6, "aot_eager"))
    )
    assert eager[0] == pytest.approx(whole[0], rel=1e-5) and fast[0] == pytest.approx(
        whole[0], rel=1e-5
    )


def test_when_there_are_chunks():
    """Chunks at long sequences: multiples of 128 tokens, at most 8 chunks."""
    assert mlp_chunk_tokens(2**16, 2**11) is None
    assert mlp_chunk_tokens(2**16 + 1, 2**11) == 2**15 + 128
    assert mlp_chunk_tokens(131072, 5632) == 21888
    assert mlp_chunk_tokens(2**20, 5632) == 2**17
    asked = []
    with mock.patch("dtron.model.block.mlp_chunk_tokens", lambda *sizes: asked.append(sizes)):
        step(program(M, ONE, ComputeConfig("full")))
    assert asked == [(TOKENS, M.mlp)]


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_there_are_chunks_only_where_blocks_run_again(recompute):
    with chunks_of(CHUNK), Wide() as wide:
        step(program(M, ONE, ComputeConfig(recompute)))
    assert wide.rows == TOKENS
