"""Activation memory: the bytes kept for backward, and the estimate of dtron.show."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import to_local
from dtron.distributed.simulated_ranks import simulated
from dtron.layers import attention_kernels
from dtron.mesh import Layout
from dtron.model.activation_bytes import block_bytes
from dtron.model.activation_checkpoint import POLICIES
from dtron.model.batch import make_batch
from dtron.model.compute_config import ComputeConfig
from dtron.model.config import ModelConfig
from dtron.model.transformer import declare_model, forward
from dtron.moe.config import MoEConfig
from dtron.params import init
from dtron.rules import rules_for
from dtron.tools import show
from dtron.tools.memory_estimate import activation_bytes
from dtron.training.compiled_stage import compiled
from dtron.training.gradients import gradients
from dtron.training.pipeline import one_stage, program
from dtron.tree import flat, tree_map
from tests.helpers.runs import MODEL

ROWS = torch.arange(8 * 17).view(8, 17) % 61


def kept_by(m: ModelConfig, recompute: str, rows: int = 2) -> int:
    """Bytes that the eager program keeps for backward, without weights. Each storage counts
    once."""
    layout, seen = Layout(), {}
    params = tree_map(lambda w: w.requires_grad_(), init(declare_model(m), m.dims(), 0, layout))
    weights = {w.untyped_storage().data_ptr() for w in flat(params)}

    def note(x: Tensor) -> Tensor:
        memory = x.untyped_storage()
        if memory.data_ptr() not in weights:
            seen[memory.data_ptr()] = (
                memory.nbytes(),
                x,
            )  # keep it alive, or its memory may be reused
        return x

    batch = make_batch(torch.zeros(rows, m.context + 1, dtype=torch.long), layout)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        forward(params, batch, m, layout, ComputeConfig(recompute))
    return sum(n for n, _ in seen.values())


@pytest.mark.parametrize("position", ["pre", "post", "sandwich"])
def test_the_estimate_of_kept_activations(position):
    """Bytes of one block, from models of 2 and of 3 blocks. Exact under full recomputation, where a
    block keeps its input. Otherwise the eager program keeps more: intermediate results of norms and
    activation functions."""
    m = ModelConfig(vocab=32, embed=64, heads=4, kv_heads=2, head_dim=16, mlp=128, context=128)
    m = replace(m, norm_position=position)
    of_a_block = lambda r: kept_by(replace(m, layers=3), r) - kept_by(replace(m, layers=2), r)
    sizes = block_bytes(m, MeshShape(), 2 * 128, element=4)
    estimate = lambda r: POLICIES[r].block(0).kept_bytes(sizes)
    assert of_a_block("full") == estimate("full")
    assert 1 <= of_a_block("none") / estimate("none") <= 3


def test_memory_by_length_of_sequence(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert show.main(["--mesh", "cp=4,tp=2,pp=2", "--model", "llama3-8b"]) == 0
    assert "131,072 │           16,384" in capsys.readouterr().out
    m, whole, n = ModelConfig(vocab=64), MeshShape(), 2**17  # short enough for no chunks
    for policy in POLICIES.values():
        one, two = (
            activation_bytes(m, MeshShape(cp=cp), n, policy, "ulysses", [4]) for cp in (1, 2)
        )
        assert one == activation_bytes(m, whole, n, policy, "ring", [4]) and 0.5 < two / one < 0.7


def test_of_a_long_sequence_an_mlp_has_a_chunk_at_work():
    """An eighth of the activations of all tokens, of one layer only, and as much again for
    gradients."""
    m = ModelConfig(embed=512, heads=4, kv_heads=4, head_dim=128)

    def needs(width, n):
        return (
            activation_bytes(replace(m, mlp=width), MeshShape(), n, POLICIES["full"], "ring", [4])
            / n
        )

    products, difference = 3, 8192 - 4096
    assert needs(8192, 2**14) - needs(4096, 2**14) == 2 * 2 * products * difference
    assert needs(8192, 2**20) - needs(4096, 2**20) == 2 * 2 * products * difference / 8


def kept_compiled(layout: Layout, model: ModelConfig, how: ComputeConfig) -> int:
    """Bytes of activations that a compiled stage keeps for backward."""
    torch.compiler.reset()
    sizes: dict[tuple[int, int], int] = {}  # blocks share some tensors
    pipe = one_stage(model, 1, layout)
    functions = program(model, layout, how, splits=False)
    functions = compiled(functions, layout, how, "aot_eager_decomp_partition")
    params = init(pipe.spec, model.dims(), 0, layout)
    weights = {to_local(w).untyped_storage().data_ptr() for w in flat(params)}

    def note(x: Tensor) -> Tensor:
        other = x.untyped_storage().data_ptr() not in weights
        if other and x.is_floating_point():  # a kernel's random state is no activation
            place = x.untyped_storage().data_ptr(), x.storage_offset()
            sizes[place] = max(sizes.get(place, 0), x.numel() * x.element_size())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        gradients(functions, params, [make_batch(ROWS, layout)], 128, pipe, 0)
    return sum(sizes.values())


@pytest.mark.parametrize(
    ("mesh", "change", "how"),
    [
        pytest.param(
            "cp=2",
            {},
            ComputeConfig("full"),
            marks=pytest.mark.xfail(
                torch.__version__ >= "2.14",
                reason="torch 2.14 keeps the queries and the result of a ring",
                strict=True,
            ),
        ),
        pytest.param("cp=4", {}, ComputeConfig("full"), marks=pytest.mark.slow),
        pytest.param(
            "dp=2,cp=2", {}, ComputeConfig("full", cp_method="ulysses"), marks=pytest.mark.slow
        ),
        pytest.param(
            "dp=4,ep=4",
            {"moe": MoEConfig(experts=8, top_k=2)},
            ComputeConfig("full", moe_dispatch="static"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "tp=4",
            {"embed": 64, "mlp": 256},
            ComputeConfig("full", fp8="tensorwise", fp8_first_last=True, fp8_min_weights=0),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_full_recomputation_keeps_the_input_of_a_block_and_nothing_else(mesh, change, how):
    """Compiled too, where a custom function may hide from the compiler that it can be recomputed.
    Under torch 2.11 a ring kept all queries, keys, values and results. The difference of two models
    leaves out what blocks share. One rank of the mesh compiles, because sizes do not depend on
    received values."""
    with simulated(MeshShape.parse(mesh)) as devices:
        pass  # the mesh outlives its simulation
    sizes, layout = replace(MODEL, **change), Layout(devices, rules_for(0))
    one, two = (kept_compiled(layout, replace(sizes, layers=n), how) for n in (1, 2))
    numbers = 64  # bytes for a few: an auxiliary loss
    if sizes.moe.experts:  # the scores of the chosen experts, which torch returns with the choice
        numbers += ROWS[:, :-1].numel() // layout.mesh.size() * sizes.moe.top_k * 4
    assert 0 <= two - one - ROWS[:, :-1].numel() // layout.mesh.size() * sizes.embed * 4 <= numbers


def test_keys_that_heads_share_are_kept_once(monkeypatch):
    """The kernels need sinks for every head. A compiler would keep these copies for backward."""
    m = replace(MODEL, layers=1, kv_heads=1)
    kept = kept_compiled(Layout(), m, ComputeConfig())
    monkeypatch.setattr(
        attention_kernels, "recompute_in_backward", lambda fn, *xs: fn(*xs)
    )  # the mutant
    copies = 2 * ROWS[:, :-1].numel() * (m.heads - 1) * m.head_dim * 4
    assert kept_compiled(Layout(), m, ComputeConfig()) - kept == m.layers * copies > 0
