"""The pictures of the notebooks say what dtron does: their numbers are those of real tensors, steps
and tables."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtron.course.views import (
    context,
    cost,
    expert_loads,
    layer,
    norm_gradient,
    owners,
    planned_step,
    rounding,
    schedules,
    tensors,
    zero,
)
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import by_rank, simulated
from dtron.errors import UserError
from dtron.mesh import Layout
from dtron.model.config import ModelConfig
from dtron.model.flops import parameter_count
from dtron.rules import RULES
from dtron.schedules import SCHEDULES, make, simulate
from dtron.tools.count_collectives import Collective


def words(svg: str) -> list[str]:
    """The texts of a picture, which must be well-formed."""
    (root,) = re.findall(r"<svg.*?</svg>", svg, re.S)
    return [t.text or "" for t in ET.fromstring(root).iter("{http://www.w3.org/2000/svg}text")]


@settings(max_examples=8)
@given(
    mesh=st.sampled_from(["dp=2,tp=2", "dp=4", "dp_replicate=2,dp=2", "tp=3"]),
    rows=st.integers(1, 9),
    axes=st.sampled_from([("embed", "mlp"), ("tokens_sp", "act_embed")]),
)
def test_shards_are_those_of_a_real_tensor(mesh, rows, axes):
    said = words(tensors.shards(mesh, axes, rows, 6))
    with simulated(MeshShape.parse(mesh)) as device_mesh:
        x = Layout(device_mesh).shard(torch.arange(rows * 6).view(rows, 6), *axes)
        for rank, local in by_rank(x.to_local(), 0).items():
            line = f"rank {rank}: {list(local.shape)}"
            if local.numel():
                top, left = divmod(int(local[0, 0]), 6)
                line += f" from [{top}, {left}]"
            else:
                line += ", empty"
            assert line in said


def test_a_row_of_the_rules_moves_the_shards():
    svgs = {tensors.shards("dp=2,cp=2", rules={**RULES, "embed": row}) for row in ((), ("dp",))}
    assert len(svgs) == 2


def test_one_rank_is_refused_in_one_line():
    with pytest.raises(UserError, match="mesh dp=1: it has one rank"):
        tensors.shards("dp=1")


@settings(max_examples=5)
@given(tied=st.booleans(), layers=st.integers(1, 3), kv_heads=st.sampled_from([1, 2, 4]))
def test_the_parameters_are_all_parameters(tied, layers, kv_heads):
    m = ModelConfig(layers=layers, heads=4, kv_heads=kv_heads, tied=tied)
    assert sum(cost.parameters(m).values()) == parameter_count(m)


def test_the_share_of_attention_is_said():
    said = words(cost.cost(layers=1, embed=64, heads=4, kv_heads=4, mlp=128, seq_len=64))
    weights = parameter_count(
        ModelConfig(
            vocab=32_000, layers=1, embed=64, heads=4, kv_heads=4, head_dim=16, mlp=128, context=64
        )
    )
    assert f"{weights:,} parameters" in said and "attention at 64 tokens is 0% of them" in said


@pytest.mark.parametrize("mesh", ["tp=2", "dp=2,tp=2", "dp_replicate=2,dp=2,tp=2"])
def test_the_sum_over_all_ranks_is_the_gradient_of_one_device(mesh):
    own, right = norm_gradient.summands(mesh)
    torch.testing.assert_close(torch.stack([*own.values()]).sum(0), right)
    axes = list(MeshShape.parse(mesh).atoms)
    for over, whole in ((axes, True), (axes[:-1], False), ([], False)):
        found = norm_gradient.sums(mesh, over)
        assert all(torch.allclose(g, right) == whole for g in found.values())
        said = words(norm_gradient.gradient(mesh, " ".join(over)))
        assert said.count("right") == 1 + whole * len(own)


def test_a_mesh_that_does_not_divide_the_tokens_is_refused():
    for mesh in ("dp=1", "dp=5"):
        with pytest.raises(UserError, match=f"mesh {mesh}: its ranks must divide"):
            norm_gradient.gradient(mesh)


def test_the_bytes_of_a_layer_are_those_of_its_tokens():
    """Forward and backward have one all-gather and one reduce-scatter each."""
    kind = Collective("all_gather", "tp"), Collective("reduce_scatter", "tp")
    for mesh, rows in (("tp=2", 64), ("dp=2,tp=2", 32)):
        assert layer.messages(mesh, 64) == dict.fromkeys(kind, 2 * rows * 384 * 4)
    assert "all-gather over tp: 96.0 KiB" in layer.layer_and_messages("dp=2,tp=2", 64)
    with pytest.raises(UserError, match="mesh tp=3: tp must divide"):
        layer.messages("tp=3")


@pytest.mark.parametrize("stage", [1, 2])
def test_the_step_of_a_stage_is_the_real_one(stage):
    events = zero.zero_step(stage, MeshShape(dp=2), 2, blocks=1)
    marks = [e for e in events if isinstance(e, str)]
    assert marks == ["forward", "backward"] * 2
    assert sum(e == Collective("reduce_scatter", "dp") for e in events) == stage


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_bubble_is_that_of_the_table(name):
    said = words(schedules.two_schedules(name, name, 4, 8))
    bubble = simulate(make(name, 4, 8)).bubble
    titles = [text for text in said if text.startswith(f"{name}: bubble {bubble:.1%}")]
    assert len(titles) == 1


@settings(max_examples=10)
@given(ranks=st.integers(2, 4), chunk=st.integers(1, 3))
def test_zigzag_is_even_and_every_pair_is_computed_once(ranks, chunk):
    tokens = 2 * ranks * chunk
    even, plain = (context.pairs(tokens, ranks, on) for on in (True, False))
    assert len(set(even)) == 1 and len(set(plain)) == ranks
    assert sum(even) == sum(plain) == tokens * (tokens + 1) // 2
    assert f"{even[0]} pairs" in " ".join(words(context.zigzag(tokens, ranks)))


@pytest.mark.parametrize("view", [context.zigzag, context.ring])
def test_tokens_that_the_ranks_do_not_divide_are_refused(view):
    with pytest.raises(UserError, match="12 tokens on 4 ranks"):
        view(12, 4)


def test_the_last_step_of_a_ring_has_the_keys_of_the_next_rank():
    said = words(context.ring(8, 2, on=False))
    assert said.count("keys 0-3") == said.count("keys 4-7") == 2


@settings(max_examples=10)
@given(
    factor=st.sampled_from([0.5, 1.0, 1.5, 8.0]),
    k=st.integers(1, 3),
    liked=st.sampled_from([0.0, 2.0, 20.0]),
)
def test_an_expert_keeps_its_load_or_its_capacity(factor, k, liked):
    chosen, kept = expert_loads.loads(24, 6, k, factor, liked)
    room = min(24, -int(-factor * 24 * k // 6))
    assert chosen.sum() == 24 * k
    assert kept.tolist() == chosen.clamp(max=room).tolist()
    said = words(expert_loads.expert_loads(24, 6, k, factor, liked))
    assert f"dashed: the capacity, {room} slots; the mean load is {24 * k / 6:g}" in said


def test_a_token_has_no_more_experts_than_there_are():
    with pytest.raises(UserError, match="k=4: a token has at most 2 experts"):
        expert_loads.expert_loads(8, 2, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_to_bits_is_that_of_the_format(dtype):
    bits = {name: n for n, name in rounding.FORMATS.items()}[str(dtype).removeprefix("torch.")]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, generator=generator, dtype=torch.float64)
    x = torch.cat([x, torch.tensor([0.0, 1.0, 1 + 2.0 ** -(bits + 1), 1 + 3 * 2.0 ** -(bits + 1)])])
    assert torch.equal(rounding.rounded(x, bits), x.to(dtype).double())


def test_the_error_of_a_sum_is_below_its_bound():
    for bits in (7, 12, 20):
        assert rounding.sum_error(100, bits) <= 99 * 2.0 ** -(bits + 1)
    assert rounding.sum_error(100, 23) < 1e-6 < rounding.sum_error(100, 7)


def test_every_matrix_has_an_owner():
    m = ModelConfig(layers=1, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=32, vocab=8)
    said = words(owners.owners(MeshShape(dp=2), m))
    assert {"rank 0", "rank 1"} <= {*said} and any("all-to-all over dp" in text for text in said)


def test_a_caption_has_the_axes_that_shard_each_dim():
    with simulated(MeshShape(dp=2)) as mesh:
        x = Layout(mesh).shard(torch.ones(4, 4), "embed", "mlp")
        assert tensors.pending(x) == "" and tensors.caption(x, "DF") == "[D@dp, F]"


def test_the_plan_is_that_of_the_command(monkeypatch):
    plan = planned_step.plan_of("dp=2", 1, 1)
    monkeypatch.setattr(planned_step, "plan_of", lambda *_: plan)
    said = words(planned_step.planned_step("dp=2", 1, 1))
    assert f"{plan.gib:.2f} GiB on the GPU with the most" in said
    assert {f"waits for {axis}" for axis in plan.times[0].exposed} <= {*said}
    busy = sum(plan.times[0].busy.values()) + sum(plan.times[0].exposed.values())
    assert abs(busy - plan.seconds) < 1e-3


def test_a_mesh_that_cannot_be_planned_is_said():
    with pytest.raises(UserError):
        planned_step.planned_step("tp=3")
