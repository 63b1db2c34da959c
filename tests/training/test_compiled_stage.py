"""Compiled functions give what eager ones give: gradients, updates, and nothing compiled twice."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from textwrap import dedent
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.distributed.device_mesh import DeviceMesh

import dtron.training.compiled_stage
import dtron.training.zero3_prefetch
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full
from dtron.distributed.simulated_ranks import simulated
from dtron.mesh import Layout, build_mesh
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
from dtron.training.optimizer import UpdateScalars, apply_update, init_state, with_compute_copies
from dtron.training.pipeline import one_stage, program
from dtron.training.zero3_prefetch import Zero3Prefetch
from dtron.tree import flat, tree_map
from tests.helpers.runs import MODEL
from tests.helpers.values import ADAMW, flex_on_cpu

ONE = Layout()
BLOCK = replace(
    MODEL, layers=1
)  # compiling takes seconds a layer, and on real ranks all of them do it
ROWS = torch.arange(8 * 17).view(8, 17) % 61


@pytest.fixture(autouse=True)
def forget():
    """What other tests compiled."""
    torch.compiler.reset()


DOCUMENTS = (ROWS[:, :-1] % 5 == 0).cumsum(1)
HARD = replace(BLOCK, window=5, softcap=2.0, sinks=True)  # with documents, all that a mask can have


def step(functions, model, count: int = 2, packed: bool = False):
    pipe = one_stage(model, count, ONE)
    params = init(pipe.spec, model.dims(), 0, ONE, torch.float64)
    documents = DOCUMENTS.chunk(count) if packed else [None] * count
    batches = [make_batch(r, ONE, d) for r, d in zip(ROWS.chunk(count), documents, strict=True)]
    return gradients(functions, params, batches, 64, pipe, 1)[:2]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "choices", [{}, {"norm": "layernorm", "activation": "gelu", "bias": True, "window": 5}]
)
def test_gradients_are_those_of_eager(recompute, choices):
    """Known silent error of a torch we support: gradients of exactly zero from a compiled custom
    function."""
    model = replace(
        MODEL if recompute == "full" else BLOCK, **choices
    )  # two that are recomputed apart
    want_loss, want = step(program(model, ONE, ComputeConfig(recompute)), model)
    got_loss, got = step(
        compiled(program(model, ONE, ComputeConfig(recompute)), ONE, backend="aot_eager"), model
    )
    assert got_loss.item() == pytest.approx(want_loss.item(), rel=1e-12)
    for a, b in zip(flat(got), flat(want), strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_budget_bounds_what_is_kept_for_backward():
    """And changes no gradient."""
    kept, found = [], []
    for share in (1.0, 0.5, 0.0):
        torch.compiler.reset()  # nothing in the trace reads the share: it would be compiled once
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


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_flex_in_a_compiled_stage(recompute):
    """Every microbatch has its own documents, and nothing is compiled twice for that."""
    want_loss, want = step(
        program(HARD, ONE, ComputeConfig(attention_kernel="reference")), HARD, packed=True
    )
    functions = compiled(
        program(HARD, ONE, ComputeConfig(recompute, attention_kernel="flex")),
        ONE,
        backend="aot_eager",
    )
    with flex_on_cpu():
        got_loss, got = step(functions, HARD, packed=True)
        with torch.compiler.set_stance("fail_on_recompile"):
            step(functions, HARD, packed=True)
    assert got_loss.item() == pytest.approx(want_loss.item(), rel=1e-9)
    for a, b in zip(flat(got), flat(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # its log-sum-exp is float32
    _, other = step(program(HARD, ONE), HARD)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(flat(other)[0], flat(want)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("recompute", "forward_again"), [("none", False), ("selective", False), ("full", True)]
)
def test_a_stage_makes_the_blocks_of_its_mask_once(recompute, forward_again):
    """Not in every layer, and never again in backward; and selective recomputation keeps what flex
    made."""
    graphs = []

    def note(graph, _):
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return make_boxed_func(graph.forward)

    sorts = []
    for layers in (1, 2):
        m = replace(HARD, layers=layers)
        functions = compiled(
            program(m, ONE, ComputeConfig(recompute, attention_kernel="flex")),
            ONE,
            backend=aot_autograd(fw_compiler=note),
        )
        with flex_on_cpu():
            step(functions, m, count=1, packed=True)
        forward, backward = graphs
        assert (
            forward.count("flex_attention") == backward.count("flex_attention_backward") == layers
        )
        assert backward.count("flex_attention") == layers * forward_again
        assert not any("sort" in op for op in backward)
        sorts.append(sum("sort" in op for op in forward))  # that is how torch orders a row's blocks
        graphs.clear()
    assert sorts[0] == sorts[1] > 0


def test_code_from_the_cache_finds_its_operators():
    """Of a later start on GPUs, which compiles nothing: torch registers them where it compiles."""
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


@pytest.mark.parametrize("copied", [False, True])
def test_gathers_are_laid_end_to_end_only_where_nccl_carries_them(monkeypatch, copied):
    found = []
    monkeypatch.setattr(dtron.training.compiled_stage, "copy_engine_groups", lambda mesh: copied)
    monkeypatch.setattr(
        dtron.training.compiled_stage,
        "jit",
        lambda fn, **how: found.append(how.get("options")) or fn,
    )
    compiled(Program(None, None), SimpleNamespace(mesh=SimpleNamespace(device_type="cuda")))
    passes = {name.rpartition(".")[2]: on for name, on in next(filter(None, found)).items()}
    assert passes["collective_bucketing"] is not copied and passes["enable_overlap_scheduling"]


@pytest.mark.parametrize("alone", ["the group", None])
def test_a_stage_that_gathers_its_weights_is_put_in_order_over_one_group(monkeypatch, alone):
    """Over two axes one after the other inductor moves what it can."""
    found = []
    monkeypatch.setattr(dtron.training.compiled_stage, "_weight_gather_group", lambda mesh: alone)
    monkeypatch.setattr(
        dtron.training.compiled_stage, "copy_engine_groups", lambda mesh: ["the group"]
    )
    monkeypatch.setattr(
        dtron.training.compiled_stage,
        "jit",
        lambda fn, **how: found.append(how.get("options")) or fn,
    )
    compiled(
        Program(None, None),
        SimpleNamespace(mesh=SimpleNamespace(device_type="cuda")),
        gather_each=True,
    )
    options = next(filter(None, found))
    assert ("post_grad_custom_post_pass" in options) == (alone is not None)
    assert ("aten_distributed_optimizations.enable_overlap_scheduling" in options) == (
        alone is None
    )


@pytest.mark.parametrize(
    ("mesh", "change", "cp"),
    [
        ("dp=4,ep=4", {"moe": MoEConfig(experts=8, top_k=2, mlp=16)}, "ring"),
        ("cp=4", {}, "allgather"),
    ],
)
def test_stages_that_gather_more_than_weights_are_put_in_order(monkeypatch, mesh, change, cp):
    """Recomputed tokens, router weights, keys and values, made of elementwise operators alone, are
    gathered over the same group, and used elsewhere too. The other ranks are not there: nothing is
    sent."""
    monkeypatch.setattr(dtron.training.zero3_prefetch, "FIRST", 2**11)
    model, together = replace(MODEL, **change), []
    layout = Layout(lone_rank(mesh), rules_for(3), compute=torch.bfloat16)
    prefetch = Zero3Prefetch(layout.mesh.get_group().group_name, 2**13)

    def order(module, _):
        prefetch(module.graph)
        together.append(sum("coalesced" in str(n.target) for n in module.graph.nodes))
        return make_boxed_func(module.forward)

    backend = aot_autograd(fw_compiler=order, partition_fn=min_cut_rematerialization_partition)
    pipe, how = one_stage(model, 1, layout), ComputeConfig(recompute="selective", cp_method=cp)
    functions = compiled(program(model, layout, how, splits=False), layout, how, backend=backend)
    params = init(pipe.spec, model.dims(), 0, layout)
    opt = init_state(ADAMW, pipe.spec, params)
    copies = with_compute_copies(opt, params, pipe.spec, layout.compute).compute_copies
    gradients(functions, copies, [make_batch(ROWS, layout)], 1, pipe, 3)
    assert max(together) > 1, together


def lone_rank(mesh: str) -> DeviceMesh:
    """A mesh of which this process is rank 0. It asks for as many collectives where the others are
    not there."""
    with simulated(MeshShape.parse(mesh)) as devices:
        return devices  # the mesh outlives its simulation


def test_nothing_is_compiled_again_after_the_first_step():
    functions = compiled(program(BLOCK, ONE), ONE, backend="aot_eager")
    step(functions, BLOCK)
    with torch.compiler.set_stance("fail_on_recompile"):
        step(functions, BLOCK)


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
            draw = lambda w, g=g: torch.randn(w.shape, generator=g, dtype=torch.float64).to(
                gradients_dtype
            )
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


def steps_on_pool(
    mesh: str,
    zero: int,
    backend: str | None,
    path: str = "auto",
    cp: str = "ring",
    recompute: str = "none",
    budget: float | None = None,
) -> list[float]:
    """A job for the pool: three steps, with the stage compiled for this backend or not; with the
    hard mask where a path is given. Weights are cast where they are gathered, and gradients where
    they are reduced."""
    torch.compiler.reset()  # or jobs before this one would count as recompilations
    shape, m = MeshShape.parse(mesh), BLOCK if path == "auto" else HARD
    layout = Layout(build_mesh(shape, "cpu"), rules_for(zero), compute=torch.float32)
    pipe = one_stage(m, 2, layout)
    how = ComputeConfig(recompute, budget, path, cp_method=cp)
    functions = program(m, layout, how, splits=False)
    functions = compiled(functions, layout, how, backend) if backend else functions
    params = init(pipe.spec, m.dims(), 0, layout, torch.float64)
    opt, found = init_state(ADAMW, pipe.spec, params), []
    with (
        flex_on_cpu() if path == "flex" else nullcontext()
    ):  # which forgets at its end what was compiled
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
    """What several tests compare with."""
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
    """DTensors in the trace, local kernels and collectives out of it; on real ranks. The tracer
    looks at the backward of a custom function before it knows where gradients lie; one that decides
    there by what it is shown forgets to sum them."""
    pool = request.getfixturevalue("pair" if mesh == "dp=2" else "pool")
    want = eager_on_pool(pool, mesh, zero, None)
    got = pool.run(steps_on_pool, mesh, zero, "aot_eager")
    assert got[0] == pytest.approx(want[0], rel=1e-4) and want[0] == pytest.approx(
        want[-1], rel=1e-12
    )


@pytest.mark.xdist_group("pool")
def test_a_budget_holds_where_groups_are_in_the_graph(pair):
    """The partitioner of torch 2.13 counts what is kept, and does not know what a process group
    takes."""
    how = "aot_eager_decomp_partition", "auto", "ring", "budget", 0.5
    got = pair.run(steps_on_pool, "dp=2", 3, *how)[0]
    assert got == pytest.approx(eager_on_pool(pair, "dp=2", 3, None)[0], rel=1e-4)


def collectives(mesh: str, zero: int, backend: str | None) -> dict[str, int]:
    """How many collectives of each kind one step is, seen from outside."""
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
    found = {
        e.key.partition("::")[2]: e.count for e in p.key_averages() if "c10d_functional::" in e.key
    }
    return {kind: found.get(kind, 0) for kind in kinds}


def test_a_compiled_step_communicates_what_an_eager_one_does():
    want, got = (collectives("tp=4", 1, backend) for backend in (None, "aot_eager"))
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
    """With its exchanges, in one graph; and backward exchanges too: a custom function whose
    gradients a compiler takes for zero, or a rank's own, is another loss in the next step."""
    mesh = "cp=2" if path == "auto" else "cp=4"
    pool = request.getfixturevalue("pair" if path == "auto" else "pool")
    want = pool.run(steps_on_pool, mesh, 3, None, path, cp)
    got = pool.run(steps_on_pool, mesh, 3, "aot_eager", path, cp)
    assert got[0] == pytest.approx(want[0], rel=1e-4) and want[0] == pytest.approx(
        want[-1], rel=1e-12
    )


def test_compiled_blocks_gather_again_in_backward():
    """Under ZeRO-3 no gathered weight is kept for backward, by a compiler's choice least of all; 2
    gathers once a step."""
    two, three = (collectives("dp=2,tp=2", zero, "aot_eager") for zero in (2, 3))
    matrices = sum(w.decays for w in flat(one_stage(BLOCK, 1, ONE).spec[0].blocks))
    assert three.pop("all_gather_into_tensor") - two.pop("all_gather_into_tensor") == matrices > 0
    assert three == two


@pytest.mark.xdist_group("pool")
def test_flex_in_sharded_stages(pair):
    """Each rank makes the blocks of its own documents, outside what ZeRO-3 recomputes."""
    want = pair.run(steps_on_pool, "dp=2", 3, None, "reference")
    got = pair.run(steps_on_pool, "dp=2", 3, "aot_eager", "flex")
    assert got[0] == pytest.approx(want[0], rel=1e-4)
