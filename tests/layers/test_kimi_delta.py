"""Kimi delta attention: transformers' layer on one device, and generation with a state. Its meshes
are in test_linear_attention_meshes.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import KimiLinearConfig
from transformers.models.kimi_linear import modeling_kimi_linear as kimi

from dtron.distributed.mesh_shape import MeshShape
from dtron.layers.gated_delta_net import DeltaNetConfig
from dtron.layers.kimi_delta import KimiDelta, KimiDeltaMixer, kimi_delta
from dtron.model.activation_bytes import block_bytes
from dtron.testing import assert_caught, assert_equivalent, unsummed
from tests.generation.models import assert_cached
from tests.helpers.values import ONE, normal, same, tree
from tests.helpers.wide_transformers import in_float64
from tests.layers.test_gated_delta_net import M as DELTA
from tests.layers.test_gated_delta_net import inputs_of
from tests.model.test_activation_memory import kept_by

SIZES = DeltaNetConfig(key_heads=2, value_heads=2, key_dim=5, value_dim=5, chunk=3)
M = replace(DELTA, pattern="K", delta=SIZES)


def dims() -> dict:
    return KimiDeltaMixer(M).dims() | {"embed": M.embed, "layers": 1}


def copied(p: KimiDelta) -> kimi.KimiLinearDeltaAttention:
    """transformers' layer with these weights."""
    c = SIZES
    config = KimiLinearConfig(
        hidden_size=M.embed, num_hidden_layers=1, rms_norm_eps=M.norm_eps, hidden_act="silu"
    )
    config.linear_num_heads, config.linear_head_dim = c.key_heads, c.key_dim
    config.linear_conv_kernel_dim = c.taps
    layer = kimi.KimiLinearDeltaAttention(config, 0).double()

    def rows(w: Tensor) -> Tensor:
        return w.flatten(1).T

    taps = torch.cat([w.flip(0).flatten(1) for w in (p.taps_q, p.taps_k, p.taps_v)], dim=1)
    values = {
        "q_proj.weight": rows(p.w_q),
        "k_proj.weight": rows(p.w_k),
        "v_proj.weight": rows(p.w_v),
        "conv1d.weight": taps.T[:, None],
        "forget_gate.f_a_proj.weight": rows(p.w_decay_down),
        "forget_gate.f_b_proj.weight": rows(p.w_decay_up),
        "forget_gate.dt_bias": p.dt_bias.flatten(),
        "forget_gate.A_log": p.a_log.view(1, 1, -1, 1),
        "b_proj.weight": rows(p.w_beta),
        "g_a_proj.weight": rows(p.w_gate_down),
        "g_b_proj.weight": rows(p.w_gate_up),
        "o_norm.weight": p.norm.scale,
        "o_proj.weight": p.w_o.flatten(0, 1).T,
    }
    layer.load_state_dict({name: x.detach() for name, x in values.items()})
    return layer


@pytest.mark.parametrize("packed", [False, True])
def test_the_layer_is_that_of_transformers(packed):
    p, x = tree(KimiDelta, **dims()), normal(18, M.embed)
    documents = torch.tensor([0] * 9 + [1, 1, 2, 2, 2, 2, 2, 3, 3]).view(2, 9) if packed else None
    inputs = inputs_of(M, 2, 9, documents, ONE)
    lengths, layer = [9, 2, 5, 2] if packed else [9, 9], copied(p)
    with in_float64(kimi):
        want = torch.cat([layer(row[None])[0] for row in x.split(lengths)])
    same(kimi_delta(p, x, inputs, ONE), want, [x])


def test_the_norm_over_tp():
    """The mutant: gradients of the weights that all heads share are not summed over tp."""

    def fn(p, x, layout):
        return kimi_delta(p, x, inputs_of(M, 2, 8, None, layout), layout)

    case = (fn, KimiDelta, "dp=2,tp=2", dims())
    assert_equivalent(*case, tokens=16, zero=3)
    assert_caught(lambda: assert_equivalent(*case, tokens=16, zero=3, mutate=unsummed))


def test_the_cache_changes_nothing():
    assert_cached(M)


def test_memory():
    sizes = DeltaNetConfig(key_heads=2, value_heads=4, key_dim=16, value_dim=16, chunk=32)
    wide = replace(M, layers=3, embed=64, mlp=128, context=128, vocab=32, delta=sizes)
    of_a_block = kept_by(wide, "none") - kept_by(replace(wide, layers=2), "none")
    assert 1 <= of_a_block / block_bytes(wide, MeshShape(), 2 * 128, element=4).all <= 3
