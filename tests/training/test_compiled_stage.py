"""Compiled functions give eager results: gradients and updates. Nothing is compiled twice."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from textwrap import dedent
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

import dtron.training.compiled_stage
from dtron.layers import attention_kernels
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.compute_config import ComputeConfig
from dtron.moe.config import MoEConfig
from dtron.params import init
from dtron.rules import rules_for
from dtron.runtime.config import OptimConfig
from dtron.schedules.runner import Program
from dtron.training.compiled_stage import compiled
from dtron.training.gradients import gradients
from dtron.training.optim_config import build_optimizer
from dtron.training.optimizer import apply_update, init_state
from dtron.training.pipeline import one_stage, program
from dtron.training.traced_function import GraphCompiler
from dtron.training.update_scalars import UpdateScalars
from dtron.tree import flat, tree_map
from tests.helpers.compiled import BLOCK, DOCUMENTS, HARD, ONE, ROWS, lone_rank
from tests.helpers.runs import MODEL
from tests.helpers.values import flex_on_cpu

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def step(functions, model, count: int = 2, packed: bool = False):
    pipe = one_stage(model, count, ONE)
    params = init(pipe.spec, model.dims(), 0, ONE, torch.float64)
    documents = DOCUMENTS.chunk(count) if packed else [None] * count
    batches = [make_batch(r, ONE, d) for r, d in zip(ROWS.chunk(count), documents, strict=True)]
    return gradients(functions, params, batches, 64, pipe, 1)[:2]


def kinds(functions: Program) -> int:
    """The number of kinds of units that one device has compiled."""
    return len(functions.stage.keywords["call"].kinds)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "choices", [{}, {"norm": "layernorm", "activation": "gelu", "bias": True, "window": 5}]
)
def test_gradients_are_those_of_eager(recompute, choices):
    """Known silent error of a supported torch: gradients of exactly zero from a compiled custom
    function. Nothing is compiled again after the first step."""
    model = replace(
        MODEL if recompute == "full" else BLOCK, **choices
    )  # two blocks, each with its own recomputation
    want_loss, want = step(program(model, ONE, ComputeConfig(recompute)), model)
    functions = compiled(program(model, ONE, ComputeConfig(recompute)), ONE, backend="aot_eager")
    got_loss, got = step(functions, model)
    once = kinds(functions)
    step(functions, model)
    assert kinds(functions) == once
    assert got_loss.item() == pytest.approx(want_loss.item(), rel=1e-12)
    for a, b in zip(flat(got), flat(want), strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_budget_bounds_what_is_kept_for_backward():
    """A budget changes no gradient."""
    kept, found = [], []
    for share in (1.0, 0.5, 0.0):
        torch.compiler.reset()  # the trace does not read the budget, so it would be compiled once
        how, sizes = ComputeConfig("budget", share), []
        functions = compiled(program(BLOCK, ONE, how), ONE, how, "aot_eager_decomp_partition")
        count = lambda x, sizes=sizes: sizes.append(x.numel() * x.element_size()) or x
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            found.append(step(functions, BLOCK)[1])
        kept.append(sum(sizes))
    assert kept[0] > kept[1] > kept[2]
    for other in found[1:]:
        for a, b in zip(flat(found[0]), flat(other), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_compiled_stage_that_is_another_is_noticed():
    """The comparison above can fail: with another epsilon in the compiled stage alone, it does."""
    _, want = step(program(BLOCK, ONE), BLOCK)
    _, got = step(
        compiled(program(replace(BLOCK, norm_eps=1e-3), ONE), ONE, backend="aot_eager"), BLOCK
    )
    with pytest.raises(AssertionError):
        torch.testing.assert_close(flat(got)[0], flat(want)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("recompute", ["none", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("mesh", "change", "fp8", "kinds"),
    [
        ("dp=1", {}, "none", ["block", "loss"]),
        ("dp=1", {}, "tensorwise", ["block", "block in FP8", "loss"]),
        (
            "dp=2,tp=2",
            {"moe": MoEConfig(experts=4, top_k=2, mlp=16, dense_layers=1)},
            "none",
            ["embedding", "dense block", "block with experts", "loss"],
        ),
        pytest.param(
            "cp=2",
            {"window": 5, "full_every": 2},
            "none",
            ["embedding", "block with a window", "block without", "loss"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_graphs_do_not_depend_on_the_number_of_layers(mesh, change, fp8, kinds, recompute):
    """Equal blocks of a model of four share a graph for forward and one for backward."""
    layout = ONE if mesh == "dp=1" else Layout(lone_rank(mesh), rules_for(1))
    how, graphs = ComputeConfig(recompute, fp8=fp8, fp8_min_weights=0), []
    model = replace(MODEL, layers=4, **change)
    functions = program(model, layout, how, splits=False)
    functions = compiled(functions, layout, how, backend=noting(graphs))
    pipe = one_stage(model, 1, layout)
    params = init(pipe.spec, model.dims(), 0, layout)
    gradients(functions, params, [make_batch(ROWS, layout)], 1, pipe, 1)
    once = (
        0 if mesh == "dp=1" else 2
    )  # the reductions of a step's gradients, which have no backward
    assert len(graphs) == 2 * len(kinds) + once


def noting(graphs: list[list[str]]):
    """A backend that notes the operators of each graph: of forward, then of backward."""

    def note(graph, _):
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=note, partition_fn=min_cut_rematerialization_partition)


def flex_stage(model, recompute: str, graphs: list[list[str]]) -> Program:
    how = ComputeConfig(recompute, attention_kernel="flex")
    return compiled(program(model, ONE, how), ONE, backend=noting(graphs))


@pytest.mark.parametrize(
    ("recompute", "forward_again"), [("none", False), ("selective", False), ("full", True)]
)
def test_flex_in_a_compiled_stage(monkeypatch, recompute, forward_again):
    """Every microbatch has its own documents, and nothing is recompiled for them. The blocks of the
    mask are computed once a microbatch: not in every layer, and not again in backward. Selective
    recomputation keeps flex's results."""
    model, graphs, masks = replace(HARD, layers=2), [], []
    made = attention_kernels.create_block_mask
    monkeypatch.setattr(
        attention_kernels, "create_block_mask", lambda *x: masks.append(1) or made(*x)
    )
    reference = ComputeConfig(attention_kernel="reference")
    want_loss, want = step(program(model, ONE, reference), model, packed=True)
    functions = flex_stage(model, recompute, graphs)
    with flex_on_cpu():
        got_loss, got = step(functions, model, packed=True)
        assert len(masks) == 2
        once = kinds(functions)
        step(functions, model, packed=True)
        assert kinds(functions) == once
    assert got_loss.item() == pytest.approx(want_loss.item(), rel=1e-9)
    for a, b in zip(flat(got), flat(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # its log-sum-exp is float32
    _, other = step(program(model, ONE), model)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(flat(other)[0], flat(want)[0], rtol=1e-5, atol=1e-6)
    operators = [op for graph in graphs for op in graph]  # both layers have the same graphs
    assert operators.count("flex_attention") == 1 + forward_again
    assert operators.count("flex_attention_backward") == 1


def test_code_from_the_cache_finds_its_operators():
    """A later start on GPUs compiles nothing. torch registers these operators only when it
    compiles."""
    code = """
        from types import SimpleNamespace as Of
        import torch
        from dtron.schedules.runner import Program
        from dtron.training.compiled_stage import compiled
        found = lambda: hasattr(torch.ops.bucketing, "_pre_bucket_all_gather")
        before = found()
        compiled(Program(None, None), Of(mesh=Of(device_type="cuda", ndim=0)))
        assert (before, found()) == (False, True), (before, found())
    """
    done = subprocess.run(
        [sys.executable, "-c", dedent(code)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def note_options(monkeypatch, found: list[dict | None]) -> None:
    def compiler(backend, options=None, *rest):
        found.append(options)
        return GraphCompiler(backend, options, *rest)

    monkeypatch.setattr(dtron.training.compiled_stage, "GraphCompiler", compiler)


@pytest.mark.parametrize("copied", [False, True])
def test_gathers_are_laid_end_to_end_only_where_nccl_carries_them(monkeypatch, copied):
    found = []
    monkeypatch.setattr(dtron.training.compiled_stage, "copy_engine_groups", lambda mesh: copied)
    note_options(monkeypatch, found)
    compiled(Program(None, None), SimpleNamespace(mesh=SimpleNamespace(device_type="cuda")))
    passes = {name.rpartition(".")[2]: on for name, on in next(filter(None, found)).items()}
    assert passes["collective_bucketing"] is not copied and passes["enable_overlap_scheduling"]


def test_torch_moves_no_collective_by_itself(monkeypatch):
    """A pass that torch has by default is off in the stage, and in the functions of lists of
    gradients."""
    found, name = [], "aten_distributed_optimizations.enable_simple_overlap"
    monkeypatch.setattr(torch._inductor, "list_options", lambda: [name])
    note_options(monkeypatch, found)
    mesh = SimpleNamespace(device_type="cpu", mesh_dim_names=(), ndim=0)
    compiled(Program(None, None), SimpleNamespace(mesh=mesh))
    assert len(found) == 2 and all(options[name] is False for options in found)


@pytest.mark.parametrize("gradients_dtype", [torch.float64, torch.bfloat16])
def test_the_written_out_rule_is_the_fused_one(gradients_dtype):
    model, adamw = MODEL, build_optimizer(OptimConfig(weight_decay=0.3, eps=1e-3))
    spec = one_stage(model, 1, ONE).spec
    states = []
    for optimizer in (adamw, adamw.compiled("aot_eager")):
        params = init(spec, model.dims(), 0, ONE, torch.float64)
        opt = init_state(optimizer, spec, params)
        for number in range(3):
            g = torch.Generator().manual_seed(number)

            def draw(w, g=g):
                return torch.randn(w.shape, generator=g, dtype=torch.float64).to(gradients_dtype)

            grads, scalars = tree_map(draw, params), UpdateScalars(0.1 / (number + 1), 0.7)
            params, opt = apply_update(optimizer, spec, params, grads, opt, scalars, ONE)
        states.append((params, opt))
    (a, a_opt), (b, b_opt) = states
    assert a_opt.step == b_opt.step == 3
    for x, y in zip(
        flat((a, *a_opt.trees.values())),
        flat((b, *b_opt.trees.values())),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
