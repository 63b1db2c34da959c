"""Mamba-2: its chunked form is its definition, transformers' layer on one device, the result of one
device on any mesh, and generation with a state. Whole steps on meshes are in
test_linear_attention_meshes.py."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import NemotronHConfig
from transformers.models.nemotron_h import modeling_nemotron_h as nemotron

from dtron.distributed.mesh_shape import MeshShape
from dtron.errors import UserError
from dtron.layers import ssd as module
from dtron.layers.mamba2 import Mamba2, Mamba2Config, Mamba2Mixer, mamba2
from dtron.layers.ssd import SSDTokens, ssd, ssd_by_token
from dtron.layers.state_passing import map_elements
from dtron.model.activation_bytes import block_bytes
from dtron.model.batch import make_batch
from dtron.model.config import ModelConfig
from dtron.model.flops import flops_per_token, parameter_count
from dtron.model.transformer import declare_model
from dtron.model.widths import at_width
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
from tests.generation.models import assert_cached, weights
from tests.helpers.examples import examples
from tests.helpers.values import ONE, close, normal, same, tree
from tests.helpers.wide_transformers import in_float64
from tests.layers.test_delta_rule import decays_twice, forgets_the_state
from tests.layers.test_gated_delta_net import inputs_of
from tests.model.test_activation_memory import kept_by

SIZES = Mamba2Config(heads=4, head_dim=5, groups=2, state=3, chunk=3, time_step_min=0.3)
M = replace(ATTENTION, pattern="S", mamba=SIZES)
GROUPS = (1, 2)


def with_groups(groups: int, heads: int = 4) -> ModelConfig:
    return replace(M, mamba=replace(SIZES, groups=groups, heads=heads))


def dims(m: ModelConfig) -> dict:
    return m.mamba.dims() | {"embed": m.embed, "layers": 1}


# ---- the recurrence


def tokens(seq_len: int, groups: int, seed: int = 0, starts: Tensor | None = None) -> SSDTokens:
    q, k = (normal(2, seq_len, groups, 3, seed=seed + i) for i in range(2))
    v, log_decay = normal(2, seq_len, 4, 5, seed=seed + 2), normal(2, seq_len, 4, seed=seed + 3)
    return SSDTokens(q, k, v, (-2 * log_decay.detach().abs()).requires_grad_(), starts)


@settings(max_examples=examples(12))
@given(
    seq_len=st.integers(1, 30),
    chunk=st.integers(1, 12),
    groups=st.sampled_from([1, 2, 4]),
    documents=st.booleans(),
    state=st.booleans(),
    seed=st.integers(0, 99),
)
def test_chunks_change_nothing(seq_len, chunk, groups, documents, state, seed):
    one_case(seq_len, chunk, groups, documents, state, seed)


def one_case(seq_len, chunk, groups, documents, state, seed):
    """The chunked form has the outputs, the last state and the gradients of the definition."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(2, seq_len, generator=generator) < 0.2 if documents else None
    first = normal(2, 4, 3, 5, seed=seed) if state else None
    x = tokens(seq_len, groups, seed, starts)
    want, got = ssd_by_token(x, first), ssd(x, first, chunk)
    flat_pair = (torch.cat([y.flatten() for y in pair]) for pair in (got, want))
    same(*flat_pair, [*x[:4], *([first] if state else [])])


@pytest.mark.parametrize("mutant", [decays_twice, forgets_the_state])
def test_mutants_of_the_recurrence(mutant):
    with mock.patch.object(module, "states_before", mutant):
        assert_caught(lambda: one_case(20, 4, 2, False, True, 0))


@pytest.mark.parametrize("ours", [ssd_by_token, ssd])
def test_the_recurrence_is_that_of_transformers(ours):
    x, state, dt = tokens(21, 2), normal(2, 4, 3, 5, seed=9), normal(2, 21, 4, seed=8)
    dt = dt.detach().abs().requires_grad_()
    a = -normal(4, seed=7).detach().abs().requires_grad_()
    with in_float64(nemotron):
        o, last = nemotron.mamba2_chunk_scan(
            *(x.v, dt, a, x.k, x.q, 4), initial_states=state.mT, return_final_states=True
        )
    got, got_last = ours(x._replace(v=dt[..., None] * x.v, log_decay=a * dt), state)
    want = torch.cat([o.flatten(), last.mT.flatten()])
    same(torch.cat([got.flatten(), got_last.flatten()]), want, [*x[:3], dt, a, state])


# ---- the layer


def theirs(m: ModelConfig) -> nemotron.NemotronHMamba2Mixer:
    c = m.mamba
    config = NemotronHConfig(
        hidden_size=m.embed,
        layers_block_type=["linear_attention"],
        mamba_num_heads=c.heads,
        mamba_head_dim=c.head_dim,
        n_groups=c.groups,
        ssm_state_size=c.state,
        conv_kernel=c.taps,
        chunk_size=4,
        time_step_min=c.time_step_min,
        layer_norm_epsilon=m.norm_eps,
    )
    return nemotron.NemotronHMamba2Mixer(config, 0).double()


def copy_weights(p: Mamba2, layer: nemotron.NemotronHMamba2Mixer) -> None:
    rows = [w.flatten(1).T for w in (p.w_gate, p.w_x, p.w_b, p.w_c, p.w_dt)]
    taps = [w.flip(0).flatten(1).T[:, None] for w in (p.taps_x, p.taps_b, p.taps_c)]
    values = {
        "in_proj.weight": torch.cat(rows),
        "conv1d.weight": torch.cat(taps),
        "conv1d.bias": torch.cat([b.flatten() for b in (p.bias_x, p.bias_b, p.bias_c)]),
        "A_log": p.a_log,
        "dt_bias": p.dt_bias,
        "D": p.skip,
        "norm.weight": p.norm.scale.flatten(),
        "out_proj.weight": p.w_o.flatten(0, 1).T,
    }
    layer.load_state_dict({name: x.detach() for name, x in values.items()})


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("groups", GROUPS)
def test_the_layer_is_that_of_transformers(packed, groups):
    """One document at a time. The epsilon of the norm and the least time step are noticed."""
    m = replace(with_groups(groups), norm_eps=1e-2)
    p, x = tree(Mamba2Mixer(m).params, **dims(m)), normal(18, m.embed)
    layer = theirs(m)
    copy_weights(p, layer)
    documents = torch.tensor([0] * 9 + [1, 1, 2, 2, 2, 2, 2, 3, 3]).view(2, 9) if packed else None
    inputs = inputs_of(m, 2, 9, documents, ONE)
    lengths = [9, 2, 5, 2] if packed else [9, 9]
    with in_float64(nemotron):
        want = torch.cat([layer(row[None])[0] for row in x.split(lengths)])
    same(mamba2(p, x, inputs, m.mamba, ONE), want, [x])
    wrong = replace(inputs, eps=1e-5), replace(m.mamba, time_step_min=0.0)
    for case in ((wrong[0], m.mamba), (inputs, wrong[1])):
        assert (mamba2(p, x, *case, ONE) - want).abs().max() > 1e-3


def layer_of(rows: int, seq_len: int, m: ModelConfig):
    def fn(p, x, layout):
        return mamba2(p, x, inputs_of(m, rows, seq_len, None, layout), m.mamba, layout)

    return fn


@settings(max_examples=examples(4))
@given(
    mesh=meshes(6, ("dp", "cp", "tp")),
    zero=zero_stages(),
    one=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_layer_on_any_mesh(mesh, zero, one, seed):
    tp, rows = MeshShape.parse(mesh).tp, MeshShape.parse(mesh).dp
    m = with_groups(1 if one else 2 * tp, 2 * tp)
    params = Mamba2Mixer(m).params
    case = (layer_of(rows, 24, m), params, mesh, dims(m))
    assert_equivalent(*case, tokens=24 * rows, zero=zero, seed=seed)


@pytest.mark.parametrize(
    ("groups", "mutate"),
    [(1, dropped(0)), (1, dropped(1)), (1, dropped(2)), (1, unsummed), (2, dropped(0))],
)
def test_the_layer_over_tp(groups, mutate):
    """The mutants: a constrain is left out (the second is the sum of squares of the one group); the
    gradients of B and C, which the ranks share, are not summed over tp."""
    m = with_groups(groups)
    case = (layer_of(2, 8, m), Mamba2Mixer(m).params, "tp=2", dims(m))
    assert_equivalent(*case, tokens=16)
    assert_caught(lambda: assert_equivalent(*case, tokens=16, mutate=mutate))


@pytest.mark.parametrize(("mesh", "groups"), [("tp=2", 2), ("tp=2", 1), ("cp=2,tp=2", 2)])
def test_collectives_and_their_bytes(mesh, groups):
    """Over tp a layer gathers and scatters its tokens once each way, and with one group sums a
    number per token each way. Over cp its bytes do not depend on the length."""
    m, cp = with_groups(groups), MeshShape.parse(mesh).cp
    own = map_elements(2, SIZES.heads // 2, SIZES.state, SIZES.head_dim, scalar=True)
    for seq_len in (16, 32):
        params, fn = Mamba2Mixer(m).params, layer_of(2, seq_len, m)
        case = LayerCase(fn, params, dims(m), tokens=2 * seq_len, zero=0)
        got = run_layer(case, mesh).total
        for kind in ("all_gather", "reduce_scatter"):
            assert got.count[Collective(kind, "tp")] == 2
            assert got.count[Collective(kind, "cp")] == (cp > 1)
            assert got.bytes[Collective(kind, "cp")] == (8 * cp * own if cp > 1 else 0)
        if groups == 1:
            assert got.bytes[Collective("all_reduce", "tp")] >= 2 * 8 * 2 * seq_len
        else:
            assert got.count[Collective("all_reduce", "tp")] == 0


def test_a_compiled_stage():
    """The tracer sees through the mixer. Compiled gradients are eager gradients."""
    m, batch = replace(M, pattern="SA"), make_batch(torch.arange(34).view(2, 17) % 61, ONE)
    pipe, params, found = one_stage(m, 1, ONE), weights(m), []
    for functions in (program(m, ONE), compiled(program(m, ONE), ONE, backend="aot_eager")):
        loss, grads, _ = gradients(functions, params, [batch], 32, pipe, 0)
        found.append([loss, *flat(grads)])
    for want, got in zip(*found, strict=True):
        close(got, want)


@pytest.mark.parametrize("groups", GROUPS)
def test_the_cache_changes_nothing(groups):
    """Rows of unequal lengths, in pieces. A state or a tail that stays empty is noticed."""
    m = replace(with_groups(groups), pattern="SA")
    check_all = partial(assert_cached, m)
    check_all()

    def forgetful(x, state, *others):
        return ssd(x, None if state is None else torch.zeros_like(state), *others)

    mutants = {"mamba2.ssd": forgetful, "recurrent_mixer.update_tail": lambda *args: None}
    for name, mutant in mutants.items():
        with mock.patch(f"dtron.layers.{name}", mutant):
            assert_caught(check_all)


# ---- estimates and checks


def test_flops_and_memory():
    rest = 6 * (parameter_count(M) - 61 * 24)
    assert flops_per_token(M, 32) == rest + 2 * 12 * 4 * 3 * 5 == flops_per_token(M, 64)
    sizes = Mamba2Config(heads=4, head_dim=16, groups=2, state=16, chunk=32)
    wide = replace(M, layers=3, embed=64, mlp=128, context=128, vocab=32, mamba=sizes)
    of_a_block = kept_by(wide, "none") - kept_by(replace(wide, layers=2), "none")
    assert 1 <= of_a_block / block_bytes(wide, MeshShape(), 2 * 128, element=4).all <= 3


def test_its_weights():
    assert at_width(M, 2 * M.embed).mamba.heads == 8
    spec = declare_model(M).blocks[0].mixer
    names = ("a_log", "dt_bias", "skip", "norm", "bias_x")
    assert not any(w.decays for name in names for w in flat(getattr(spec, name)))
    assert spec.taps_b.decays and spec.w_dt.decays


def test_what_its_checks_refuse():
    assert replace(M, pattern="SA").token_order("ring") == "contiguous"
    check(with_groups(1), MeshShape(tp=4), 16)
    with pytest.raises(UserError, match="data.seq_len=4 over cp=2.*--data.seq-len 6"):
        check(M, MeshShape(cp=2), 4, zigzag=False)
    with pytest.raises(UserError, match="model.mamba.heads=4 over tp=8: tp must divide"):
        check(M, MeshShape(tp=8), 16)
    with pytest.raises(UserError, match="model.mamba.groups=2 over tp=4: tp must divide"):
        check(M, MeshShape(tp=4), 16)
    with pytest.raises(UserError, match="groups must divide.*--model.mamba.groups 2"):
        Mamba2Config(groups=3, heads=4)
    with pytest.raises(UserError, match="model.mamba.time_step_min=-1"):
        Mamba2Config(time_step_min=-1.0)
