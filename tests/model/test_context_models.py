"""Context parallelism with experts, latent attention and multi-token prediction: a step is the step
of one device, and mutants are caught."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import simulated
from dtron.layers import context_parallel, ring_attention
from dtron.layers.attention_block_kernels import block_backward, block_forward
from dtron.layers.mla import MLAConfig
from dtron.layers.rope import RopeConfig
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.mtp import MTPConfig
from dtron.moe.config import MoEConfig
from dtron.runtime.config import DataConfig, RunConfig
from dtron.runtime.validate import check
from dtron.testing import assert_caught
from dtron.tools import verify_step
from dtron.tools.verify_step import one_step
from tests.helpers.experts import expert_meshes
from tests.helpers.runs import on_pool, train
from tests.helpers.values import close
from tests.layers.test_context_parallel import (
    assert_same_step,
    changed,
    configured,
    forgets,
)
from tests.layers.test_context_parallel_ranks import CP_MODEL
from tests.moe.test_moe_models import EVERYTHING

LATENT = MLAConfig(kv_rank=9, q_rank=11, nope_dim=6, rope_dim=4, v_dim=5)
WARM = RopeConfig(scaling="yarn", original=8, mscale_all=1.0)


def of_experts(mesh: str, aux_level: str = "sequence", **choices) -> RunConfig:
    shape = MeshShape.parse(mesh)
    own = {k: choices.pop(k) for k in list(choices) if k in MoEConfig.__dataclass_fields__}
    c = MoEConfig(2 * shape.ep, 2, 4 * shape.etp, aux_level=aux_level, **{**EVERYTHING, **own})
    return configured(mesh, moe=c, **{"micro_batch": 2, **choices})


# ---- experts


EXPERTS = [
    ("cp=2,ep=2", {}),
    ("cp=2,tp=2,ep=4", {"zero": 3, "documents": True, "recompute": "full"}),
    ("cp=4,ep=2", {"zero": 2}),  # cp is two dims of the mesh, and keys go round both
    ("cp=4,ep=2", {"method": "ulysses", "zigzag": "on", "aux_level": "global_batch"}),
    ("cp=2,ep=2", {"balanced": True}),  # by the position of a token in the batch
]


@pytest.mark.parametrize(("mesh", "choices"), EXPERTS)
def test_experts(mesh, choices):
    assert_same_step(of_experts(mesh, **choices))


@pytest.mark.slow
@settings(max_examples=25)
@given(
    mesh=expert_meshes(8).filter(lambda mesh: "cp" in mesh),
    method=st.sampled_from(["ring", "allgather", "ulysses"]),
    zigzag=st.sampled_from(["on", "off"]),
    documents=st.booleans(),
    attention_kernel=st.sampled_from(["auto", "reference"]),
    zero=st.sampled_from([0, 1, 2, 3]),
    recompute=st.sampled_from(["none", "selective", "full"]),
    aux_level=st.sampled_from(["micro_batch", "sequence", "global_batch"]),
    balanced=st.booleans(),
    latent=st.booleans(),
    depth=st.sampled_from([0, 1]),
    seed=st.integers(0, 99),
    moe_dispatch=st.sampled_from(["auto", "static", "allgather"]),
)
def test_any_mesh(mesh, latent, depth, **choices):
    config = of_experts(mesh, **choices)
    model = replace(config.model, mtp=MTPConfig(depth, 0.7))
    if latent:
        model = replace(model, mla=LATENT, kv_heads=model.heads)
    assert_same_step(replace(config, model=model))


EXPERT_MUTANTS = {
    "sequences left in order": (
        "cp=2,ep=2",
        {},
        lambda: mock.patch.object(verify_step, "make_batch", with_rows_in_order),
    ),
    "forced places left in order": (
        "cp=2,ep=2",
        {"balanced": True, "aux_loss": 0.0},
        lambda: mock.patch.object(Layout, "shard", places_in_order),
    ),
    "keys that never come over two dims": ("cp=4,ep=2", {}, lambda: forgets(3)),
}

shard = Layout.shard


def with_rows_in_order(rows_BS, layout, *others, **choices):
    """Mutant: positions as without cp, whatever part of its row a rank has."""
    batch = make_batch(rows_BS, layout, *others, **choices)
    rows_T = torch.arange(len(rows_BS)).repeat_interleave(batch.seq_len)
    return replace(batch, rows_T=layout.shard(rows_T, "tokens"))


def places_in_order(layout: Layout, x, *axes):
    """Forced experts are the only integers that are sharded by ``tokens_sp``."""
    x = x.sort().values if axes == ("tokens_sp",) and layout.mesh is not None else x
    return shard(layout, x, *axes)


@pytest.mark.parametrize("name", EXPERT_MUTANTS)
def test_mutants_of_experts(name):
    mesh, choices, patch = EXPERT_MUTANTS[name]
    with patch():
        assert_caught(lambda: assert_same_step(of_experts(mesh, **choices)))


# ---- latent attention


def of_latents(mesh: str, method: str, **choices) -> RunConfig:
    config = configured(mesh, method, group=1, **choices)
    return replace(config, model=replace(config.model, mla=LATENT, rope=WARM))


@pytest.mark.parametrize("method", ["ring", "allgather", "ulysses"])
@pytest.mark.parametrize("attention", ["auto", "reference"])
def test_latent_attention(method, attention):
    """A kernel whose values are narrower than keys, with a scale of its own."""
    config = of_latents("cp=2", method, attention_kernel=attention)
    assert config.model.mixers[0].score_scale(config.model.rope) is not None
    assert_same_step(config)


@pytest.mark.parametrize(
    ("mesh", "method"), [("cp=2,tp=2", "ring"), ("cp=4", "ulysses"), ("dp=2,cp=2", "allgather")]
)
def test_latent_attention_on_other_meshes(mesh, method):
    assert_same_step(of_latents(mesh, method, zero=3, documents=True))


def unscaled(fn):
    return lambda *args, scale=None, **named: fn(*args, **named)


@pytest.mark.parametrize(
    "patch",
    [
        lambda: changed("positions_T"),
        lambda: mock.patch.object(ring_attention, "block_forward", unscaled(block_forward)),
        lambda: mock.patch.object(ring_attention, "block_backward", unscaled(block_backward)),
    ],
    ids=["positions left in order", "the plain scale", "the plain scale in backward"],
)
def test_mutants_of_latent_attention(patch):
    def mutated():
        want = one_step(replace(of_latents("cp=2", "ring"), mesh=""), MeshShape())
        with patch():
            got = one_step(of_latents("cp=2", "ring"), MeshShape(cp=2))
        close([want.loss, want.norm], [got.loss, got.norm])

    assert_caught(mutated)


def test_ulysses_cuts_the_heads_of_latent_attention():
    model = replace(CP_MODEL, qk_norm=False, heads=6, kv_heads=1, mla=LATENT)
    check(model, MeshShape(cp=3), 12, "ulysses")
    with pytest.raises(ValueError, match="a rank has 6 of model.heads=6.*--model.heads 8"):
        check(model, MeshShape(cp=4), 16, "ulysses")


# ---- tokens further ahead, and all of it


def ahead(mesh: str, depth: int = 2, **choices) -> RunConfig:
    config = configured(mesh, documents=True, **choices)
    return replace(config, model=replace(config.model, mtp=MTPConfig(depth, 0.7)))


@pytest.mark.parametrize(
    ("mesh", "choices"),
    [("cp=2", {}), ("cp=2,tp=2", {"method": "ulysses", "zigzag": "on", "zero": 3})],
)
def test_tokens_further_ahead(mesh, choices):
    assert_same_step(ahead(mesh, **choices))


@pytest.mark.parametrize("name", ["tokens_TA", "targets_TA"])
def test_tokens_ahead_left_in_order_are_caught(name):
    with changed(name):
        assert_caught(lambda: assert_same_step(ahead("cp=2")))


@pytest.mark.xdist_group("pool")
@pytest.mark.parametrize(
    "mesh", ["cp=4,ep=2", pytest.param("cp=2,tp=2,ep=4", marks=pytest.mark.slow)]
)
def test_deepseek_in_small_on_real_ranks(pool, mesh):
    experts = MoEConfig(
        8, 2, 16, aux_loss=0.02, bias_rate=1e-3, shared=24, aux_level="sequence", dense_layers=1
    )
    model = replace(CP_MODEL, qk_norm=False, mla=LATENT, moe=experts, mtp=MTPConfig(1, 0.5))
    config = RunConfig(
        model=model, data=DataConfig(seq_len=16), batch=4, steps=2, seed=3, micro_batch=2
    )
    want = train(Layout(), MeshShape(), config)
    for losses, norms, initial in pool.run(on_pool, mesh, config):
        assert initial == want.initial
        assert losses == pytest.approx(want.losses, rel=1e-5) and norms == pytest.approx(
            want.norms, rel=1e-4
        )


def test_one_group_for_cp_however_many_dims():
    """In the order in which DTensor shards over the axes."""
    with simulated(MeshShape(cp=4, ep=2)) as mesh:
        layout = Layout(mesh)
        assert layout.axes == ("cp.edp", "cp.ep") and layout.group("cp").ranks.size() == 4
        place = layout.to_local(layout.iota(context_parallel.AXIS, 4, "cpu"), context_parallel.AXIS)
        assert torch.equal(place, torch.full((1,), 0) + layout.group("cp").place)
