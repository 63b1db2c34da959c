"""Gated delta net: transformers' layer on one device, the result of one device on any mesh, and
generation with a state."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import simulated
from dtron.errors import UserError
from dtron.layers import delta_rule, gated_delta_net
from dtron.layers.gated_delta_net import DeltaNetConfig, GatedDeltaNet
from dtron.layers.mixer import StageInputs
from dtron.layers.state_passing import map_elements
from dtron.mesh import Layout
from dtron.model.activation_bytes import block_bytes
from dtron.model.batch import make_batch
from dtron.model.config import ModelConfig
from dtron.model.flops import flops_per_token, parameter_count
from dtron.model.transformer import declare_model
from dtron.model.widths import at_width
from dtron.rules import rules_for
from dtron.runtime.config import RunConfig
from dtron.runtime.validate import check
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
from dtron.tools.count_collectives import Collective
from dtron.training.compiled_stage import compiled
from dtron.training.gradients import gradients
from dtron.training.pipeline import one_stage, program
from dtron.tree import flat
from tests.generation.models import M as ATTENTION
from tests.generation.models import assert_cached, greedy, on_mesh, weights
from tests.helpers.examples import examples
from tests.helpers.values import ONE, close, normal, same, tree
from tests.helpers.wide_transformers import in_float64
from tests.model.test_activation_memory import kept_by

SIZES = DeltaNetConfig(key_heads=2, value_heads=4, key_dim=3, value_dim=5, chunk=3)
M = replace(ATTENTION, pattern="L", delta=SIZES)


def inputs_of(m: ModelConfig, rows: int, seq_len: int, documents: Tensor | None, layout: Layout):
    batch = make_batch(
        torch.zeros(rows, seq_len + 1, dtype=torch.long), layout, documents, zigzag=False
    )
    stage = StageInputs(batch, torch.empty(0, dtype=torch.float64), (None,))
    return replace(m.mixers[0].prepare(stage, layout)[None], eps=m.norm_eps)


# ---- the definition


def theirs(m: ModelConfig) -> qwen.Qwen3NextGatedDeltaNet:
    c = m.delta
    config = Qwen3NextConfig(
        hidden_size=m.embed,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=c.key_heads,
        linear_num_value_heads=c.value_heads,
        linear_key_head_dim=c.key_dim,
        linear_value_head_dim=c.value_dim,
        linear_conv_kernel_dim=c.taps,
        rms_norm_eps=m.norm_eps,
        hidden_act="silu",
    )
    return qwen.Qwen3NextGatedDeltaNet(config, 0).double()


def copy_weights(p: GatedDeltaNet, layer: qwen.Qwen3NextGatedDeltaNet, c: DeltaNetConfig) -> None:
    """The projections of a key head stand side by side there, and its value heads with it."""

    def by_key_head(w: Tensor) -> Tensor:  # [D, heads, H] -> [key heads, rows, D]
        w = w if w.ndim == 3 else w[..., None]
        return w.flatten(1).T.unflatten(0, (c.key_heads, -1))

    rows = [by_key_head(w) for w in (p.w_q, p.w_k, p.w_v, p.w_gate)]
    gates = [by_key_head(w) for w in (p.w_beta, p.w_decay)]
    taps = torch.cat([w.flip(0).flatten(1) for w in (p.taps_q, p.taps_k, p.taps_v)], dim=1)
    values = {
        "in_proj_qkvz.weight": torch.cat(rows, dim=1).flatten(0, 1),
        "in_proj_ba.weight": torch.cat(gates, dim=1).flatten(0, 1),
        "conv1d.weight": taps.T[:, None],
        "A_log": p.a_log,
        "dt_bias": p.dt_bias,
        "norm.weight": p.norm.scale,
        "out_proj.weight": p.w_o.flatten(0, 1).T,
    }
    layer.load_state_dict({name: x.detach() for name, x in values.items()})


@pytest.mark.parametrize("packed", [False, True])
def test_the_layer_is_that_of_transformers(packed):
    """One document at a time; with the gradient of x, which passes every weight."""
    m = replace(M, norm_eps=1e-4)
    p, x = tree(GatedDeltaNet, embed=m.embed, **m.delta.dims()), normal(18, m.embed)
    layer = theirs(m)
    copy_weights(p, layer, m.delta)
    documents = torch.tensor([0] * 9 + [1, 1, 2, 2, 2, 2, 2, 3, 3]).view(2, 9) if packed else None
    got = gated_delta_net.gated_delta_net(p, x, inputs_of(m, 2, 9, documents, ONE), ONE)
    lengths = [9, 2, 5, 2] if packed else [9, 9]
    with in_float64(qwen):
        want = torch.cat([layer(row[None])[0] for row in x.split(lengths)])
    same(got, want, [x])


# ---- meshes: the layer alone


TP_DIMS = {**SIZES.dims(), "embed": 10, "layers": 1}


def layer_of(rows: int, seq_len: int, m: ModelConfig = M):
    def fn(p, x, layout):
        x_inputs = inputs_of(m, rows, seq_len, None, layout)
        return gated_delta_net.gated_delta_net(p, x, x_inputs, layout)

    return fn


@settings(max_examples=examples(4))
@given(mesh=meshes(6, ("dp", "cp", "tp")), zero=zero_stages(), seed=st.integers(0, 99))
def test_the_layer_on_any_mesh(mesh, zero, seed):
    heads = MeshShape.parse(mesh).tp
    sizes = replace(SIZES, key_heads=heads, value_heads=2 * heads)
    dims, rows = TP_DIMS | sizes.dims(), MeshShape.parse(mesh).dp
    fn = layer_of(rows, 24, replace(M, delta=sizes))
    assert_equivalent(fn, GatedDeltaNet, mesh, dims, tokens=24 * rows, zero=zero, seed=seed)


@pytest.mark.parametrize("mutate", [dropped(0), dropped(1), unsummed])
def test_the_layer_over_tp(mutate):
    """The mutants: a constrain is left out; the gradient of the gated norm's weight, which all
    heads share, is not summed over tp."""
    case = (layer_of(2, 8), GatedDeltaNet, "tp=2", TP_DIMS)
    assert_equivalent(*case, tokens=16)
    assert_caught(lambda: assert_equivalent(*case, tokens=16, mutate=mutate))


@pytest.mark.parametrize("mesh", ["tp=2", "cp=2,tp=2", "cp=4"])
def test_collectives_and_their_bytes(mesh):
    """Over tp a layer gathers and scatters its tokens once each way. Over cp it sends the halo and
    gathers the maps, and backward does the reverse. The bytes do not depend on the length."""
    cp, tp = (getattr(MeshShape.parse(mesh), axis) for axis in ("cp", "tp"))
    shared = Collective("all_gather", "cp"), Collective("reduce_scatter", "cp")
    sent = Collective("all_to_all", "cp")
    found = []
    for seq_len in (16, 32):
        got = run_layer(
            LayerCase(layer_of(2, seq_len), GatedDeltaNet, TP_DIMS, tokens=2 * seq_len, zero=0),
            mesh,
        ).total
        for kind in ("all_gather", "reduce_scatter"):
            assert got.count[Collective(kind, "tp")] == (2 if tp > 1 else 0)
        assert [got.count[c] for c in (*shared, sent)] == ([1, 1, 2] if cp > 1 else [0, 0, 0])
        own = map_elements(2, SIZES.value_heads // tp, SIZES.key_dim, SIZES.value_dim)
        tail = 2 * (SIZES.taps - 1) * SIZES.channels // tp
        want = [8 * cp * own, 8 * cp * own, 2 * 8 * tail] if cp > 1 else [0, 0, 0]
        assert [got.bytes[c] for c in (*shared, sent)] == want
        found.append(want)
    assert found[0] == found[1]


def test_a_compiled_stage():
    """The tracer sees through the mixer. Compiled gradients are eager gradients."""
    m, batch = replace(M, pattern="LA"), make_batch(torch.arange(34).view(2, 17) % 61, ONE)
    pipe, params, found = one_stage(m, 1, ONE), weights(m), []
    for functions in (program(m, ONE), compiled(program(m, ONE), ONE, backend="aot_eager")):
        loss, grads, _ = gradients(functions, params, [batch], 32, pipe, 0)
        found.append([loss, *flat(grads)])
    for want, got in zip(*found, strict=True):
        close(got, want)


# ---- generation


@pytest.mark.parametrize("pattern", ["L", "LA"])
def test_the_cache_changes_nothing(pattern):
    """Rows of unequal lengths, in pieces. A state or a tail that stays empty is noticed."""
    m = replace(M, pattern=pattern)
    check_all = partial(assert_cached, m)
    check_all()
    rule = delta_rule.delta_rule

    def forgetful(x, state, *others):
        return rule(x, None if state is None else torch.zeros_like(state), *others)

    mutants = {
        "delta_net_core.delta_rule": forgetful,
        "recurrent_mixer.update_tail": lambda *args: None,
    }
    for name, mutant in mutants.items():
        with mock.patch(f"dtron.layers.{name}", mutant):
            assert_caught(check_all)


@pytest.mark.parametrize("mesh", ["dp=2,tp=2", "cp=2"])
def test_generation_on_a_mesh(mesh):
    m = replace(M, pattern="LA")
    with simulated(MeshShape.parse(mesh)) as device_mesh:
        got = on_mesh(m, mesh, Layout(device_mesh, rules_for(1)))
    assert got == greedy(m, weights(m), one_stage(m, 1, ONE))


# ---- estimates and checks


def test_flops_and_memory():
    rest = 6 * (parameter_count(M) - 61 * 24)
    assert flops_per_token(M, 32) == rest + 2 * 18 * 4 * 3 * 5 == flops_per_token(M, 64)
    sizes = DeltaNetConfig(key_heads=2, value_heads=4, key_dim=16, value_dim=16, chunk=32)
    wide = replace(M, layers=3, embed=64, mlp=128, context=128, vocab=32, delta=sizes)
    of_a_block = kept_by(wide, "none") - kept_by(replace(wide, layers=2), "none")
    assert 1 <= of_a_block / block_bytes(wide, MeshShape(), 2 * 128, element=4).all <= 3


def test_its_options():
    own = replace(M, delta=replace(SIZES, negative_eigenvalues=True, norm_eps=0.3))
    assert [inputs_of(m, 1, 9, None, ONE).largest_beta for m in (M, own)] == [1.0, 2.0]
    assert [m.mixers[0].norm_eps for m in (M, own)] == [M.norm_eps, 0.3]


def test_another_width_scales_its_heads():
    m = at_width(replace(M, pattern="LA"), 2 * M.embed)
    assert (m.delta.key_heads, m.delta.value_heads) == (4, 8) and m.heads == 2 * M.heads
    assert at_width(replace(M, pattern="A"), 2 * M.embed).delta == SIZES


def test_weights_without_decay():
    spec = declare_model(M).blocks[0].mixer
    names = ("a_log", "dt_bias", "norm")
    assert not any(w.decays for name in names for w in flat(getattr(spec, name)))
    assert spec.taps_v.decays and spec.w_beta.decays


def test_what_its_checks_refuse():
    for pattern in ("L", "LLLA"):
        m, mesh = replace(M, pattern=pattern), MeshShape(cp=2)
        assert not RunConfig(model=m).zigzags and m.token_order("ring") == "contiguous"
        with pytest.raises(UserError, match="--zigzag on over cp=2.*delta_net.*--zigzag auto"):
            check(m, mesh, 16, zigzag=True)
        check(m, mesh, 16, zigzag=False)
    with pytest.raises(UserError, match="data.seq_len=4 over cp=2.*--data.seq-len 6"):
        check(M, MeshShape(cp=2), 4, zigzag=False)
    with pytest.raises(UserError, match="model.delta.key_heads=2 over tp=4: tp must divide"):
        check(M, MeshShape(tp=4), 16)
    with pytest.raises(UserError, match="key_heads must divide.*--model.delta.key-heads 2"):
        DeltaNetConfig(key_heads=3, value_heads=4)
    with pytest.raises(UserError, match="model.delta.taps=1: must be from 2 to 64"):
        DeltaNetConfig(taps=1)
    with pytest.raises(UserError, match="model.delta.norm_eps=-1.0: must be from 0"):
        DeltaNetConfig(norm_eps=-1.0)
