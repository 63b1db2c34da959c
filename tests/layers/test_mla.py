"""Multi-head latent attention: the same on every mesh, its collectives, and its definition."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtron.distributed.mesh_shape import MeshShape
from dtron.layers.attention import AttentionInputs
from dtron.layers.attention_mask import AttentionMask
from dtron.layers.mla import MLA, MLAConfig, mla
from dtron.layers.norm import norm
from dtron.layers.rope import RopeConfig, rope_tables, rotate
from dtron.model.flops import flops_per_token, parameter_count
from dtron.model.mtp import MTPConfig
from dtron.model.presets import preset
from dtron.model.transformer import declare_model
from dtron.runtime.cli import parse
from dtron.runtime.config import ModelConfig
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
from dtron.tools.show import rows
from tests.helpers.values import F64, ONE, close, halves, normal, tree, turned
from tests.layers.test_equivalence import ATTENTION_INPUTS, attention_values, tp_of
from tests.training.test_collective_counts import counts

LATENT = MLAConfig(kv_rank=9, q_rank=11, nope_dim=6, rope_dim=4, v_dim=5)
YARN = RopeConfig(100.0, "yarn", 4.0, 32, beta_fast=2.0, mscale=0.7, mscale_all=0.7)


def dims_of(latent: MLAConfig, heads: int) -> dict:
    return {"embed": 10, "heads": heads, "layers": 2, "layernorm": False, **latent.dims()}


def attend(mask: AttentionMask, latent: MLAConfig, path: str = "auto"):
    def layer(p, x, positions, documents, layout):
        make = lambda t: rope_tables(YARN, t, latent.rope_dim, torch.float64)
        table = layout.local_map(make, (("tokens",),), ("tokens", None))(positions)
        inputs = AttentionInputs(documents_T=documents, mask=mask, table_TH=table, path=path)
        return mla(p, x, inputs, layout)

    return layer


def options(seq_len: int, tokens: int) -> dict:
    return dict(inputs=ATTENTION_INPUTS, make=attention_values(seq_len, tokens), tokens=tokens)


@settings(max_examples=8)
@given(
    mesh=meshes(),
    zero=zero_stages(),
    seed=st.integers(0, 99),
    group=st.sampled_from([1, 2]),
    path=st.sampled_from(["sdpa", "reference"]),
    window=st.sampled_from([None, 5]),
    q_rank=st.sampled_from([0, 11]),
    v_dim=st.sampled_from([5, 10, 13]),
)
def test_mla(mesh, zero, seed, group, path, window, q_rank, v_dim):
    """Values narrower than keys, equal and wider; ranks of the low-rank projections that no mesh
    divides."""
    tokens = (8 if MeshShape.parse(mesh).data not in (3, 6) else 6) * 12
    latent = replace(LATENT, q_rank=q_rank, v_dim=v_dim)
    assert_equivalent(
        attend(AttentionMask(12, window, scale=0.2), latent, path),
        MLA,
        mesh,
        dims_of(latent, group * tp_of(mesh)),
        zero=zero,
        seed=seed,
        **options(12, tokens),
    )


@pytest.mark.parametrize("q_rank", [0, 11])
@pytest.mark.parametrize("mutant", [dropped(0), dropped(1), unsummed])
def test_mla_mutants(mutant, q_rank):
    """``unsummed``: heads share the rotary key, and a rank has the gradient of its own heads."""
    latent = replace(LATENT, q_rank=q_rank)
    layer, dims = attend(AttentionMask(12), latent), dims_of(latent, 4)
    check = partial(assert_equivalent, layer, MLA, "dp=2,tp=2", dims, **options(12, 48))
    check()
    assert_caught(lambda: check(mutate=mutant))


@pytest.mark.parametrize("mesh", ["tp=2", "dp=2,tp=2", "dp_replicate=2,tp=2"])
@pytest.mark.parametrize("q_rank", [0, 11])
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_mla_gathers_its_latents_and_scatters_its_tokens_once_each_way(mesh, q_rank, zero):
    latent, dp = replace(LATENT, q_rank=q_rank), MeshShape.parse(mesh).dp > 1
    fn = attend(AttentionMask(12), latent)
    got = run_layer(LayerCase(fn, MLA, dims_of(latent, 4), zero=zero, **options(12, 48)), mesh)
    matrices = 5 if q_rank else 4
    gathered = matrices if zero == 3 and dp else 0
    assert got.forward.count == counts(all_gather_tp=1, reduce_scatter_tp=1, all_gather_dp=gathered)
    tp = {c: n for c, n in got.total.count.items() if c.axis == "tp" and c.kind != "all_reduce"}
    assert tp == counts(all_gather_tp=2, reduce_scatter_tp=2)
    # Replicated over tp, so summed at the end: the down-projections. Those that dp shards are in a
    # bucket of their own, and the others are in one bucket with the norms.
    assert got.total.count[Collective("all_reduce", "tp")] == 1 + bool(zero and dp)


def test_it_is_the_definition():
    """Equations 9 to 19 of DeepSeek-V2, one head and one pair of tokens at a time."""
    latent, heads, seq_len = LATENT, 3, 5
    dims = {"embed": 10, "heads": heads, "layers": 2, "layernorm": False, **latent.dims()}
    p = tree(MLA, **dims)
    x, places = normal(seq_len, 10, seed=7), torch.arange(seq_len)
    mask, table = AttentionMask(seq_len, scale=0.3), rope_tables(YARN, places, 4, F64)
    got = mla(p, x, AttentionInputs(mask=mask, table_TH=table), ONE)
    c_q, down = norm(p.q_norm, x @ p.w_q_down), x @ p.w_kv_down
    c, r = norm(p.kv_norm, down[:, :9]), turned(down[:, None, 9:], places, YARN)[:, 0]
    want = torch.zeros_like(x)
    for n in range(heads):
        q, kv = c_q @ p.w_q_up[:, n], c @ p.w_kv_up[:, n]
        q_plain, q_rotary = q[:, :6], turned(q[:, None, 6:], places, YARN)[:, 0]
        for i in range(seq_len):
            scores = torch.stack(
                [q_plain[i] @ kv[j, :6] + q_rotary[i] @ r[j] for j in range(i + 1)]
            )
            want[i] = want[i] + ((0.3 * scores).softmax(-1) @ kv[: i + 1, 6:]) @ p.w_o[n]
    close(got, want)


def test_queries_and_keys_may_be_permuted_alike():
    """The order of rotary pairs in someone's weights is a question of reading the weights."""
    table = torch.randn(3, 4, dtype=F64)
    x = normal(3, 2, 4)
    pairs = torch.stack(x.chunk(2, -1), -1).flatten(-2)  # (x0, x2), (x1, x3) side by side
    assert torch.equal(rotate(halves(pairs, 4), table), rotate(x, table))


def test_sizes_of_the_model():
    m = ModelConfig(heads=4, kv_heads=3, mla=MLAConfig(16, 0, 8, 4, 6))  # kv_heads means nothing
    (mixer,) = m.mixers
    assert mixer.head_dims == (12, 6) and mixer.rotary_dim == 4
    assert mixer.score_scale(m.rope) is None
    spec = declare_model(m).blocks[0]
    assert spec.mixer.w_q.path == "blocks.0.mla.w_q" and spec.mixer.w_q.shape == (256, 4, 12)
    assert spec.letter == "M" and spec.mixer.w_q_down is None
    stretched = replace(m, rope=RopeConfig(1e4, "yarn", 40.0, 4096, mscale_all=1.0))
    assert stretched.mixers[0].score_scale(stretched.rope) == pytest.approx(
        (0.1 * math.log(40) + 1) ** 2 / math.sqrt(12)
    )
    plain = ModelConfig(heads=4, kv_heads=4, head_dim=9, rope=stretched.rope, positions="learned")
    assert plain.mixers[0].rope(None) is None and plain.mixers[0].score_scale(None) is None


def test_flops_count_keys_and_values_of_their_own_widths():
    """6 FLOPs per weight and token; 3 per causal pair and number of keys and values."""
    m = ModelConfig(layers=2, heads=4, mla=MLAConfig(16, 8, 8, 4, 6))
    looked_up = m.padded_vocab * m.embed
    weights = 6 * (parameter_count(m) - looked_up)
    assert flops_per_token(m, 100) == pytest.approx(weights + 2 * 6 * 4 * (12 + 6) * 50)
    ahead = replace(m, mtp=MTPConfig(1))
    weights = 6 * parameter_count(ahead)  # the head a second time
    assert flops_per_token(ahead, 100) == pytest.approx(weights + 3 * 6 * 4 * (12 + 6) * 50)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MLAConfig(q_rank=8), "q_rank=8 with kv_rank=0.*give --model.mla.kv-rank"),
        (lambda: MLAConfig(-1), "ranks are at least 0"),
        (lambda: MLAConfig(8, v_dim=0), "widths at least 1"),
        (
            lambda: MLAConfig(8, rope_dim=3),
            "rope_dim=3: rotary positions rotate pairs; make it even",
        ),
        (
            lambda: ModelConfig(mla=MLAConfig(8), sinks=True),
            "sinks=True with model.mla.kv_rank=8.*leave sinks",
        ),
        (
            lambda: ModelConfig(mla=MLAConfig(8), qk_norm=True),
            "qk_norm=True with model.mla.kv_rank=8",
        ),
        (
            lambda: ModelConfig(mla=MLAConfig(8), positions="learned"),
            "positions=learned with model.mla",
        ),
        (lambda: RopeConfig(mscale=-1.0), "mscales and attention_factor at least 0"),
        (
            lambda: check(ModelConfig(heads=6, mla=MLAConfig(8)), MeshShape(tp=4), 64),
            "heads=6 over tp=4",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(make, says):
    with pytest.raises(ValueError, match=says) as error:
        make()
    assert "\n" not in str(error.value)


def test_tp_need_not_divide_the_heads_of_keys_and_values():
    """Latent attention has none of these options."""
    check(ModelConfig(heads=6, kv_heads=4, mlp=696, mla=MLAConfig(8)), MeshShape(tp=3), 63)


def test_its_flags():
    config = parse(
        ["--model", "tiny-deepseek", "--model.mla.q-rank", "0", "--model.mtp.weight", "0.1"]
    )
    assert config.model.mla == MLAConfig(32, 0, 32, 16, 32) and config.model.mtp == MTPConfig(
        1, 0.1
    )


def test_show_has_its_weights():
    found = {r.path: r for r in rows(preset("deepseek-v3"), MeshShape(dp=8, tp=4), 3)}
    assert (
        found["blocks.3-60.moe.experts.w_up"].count == 58
        and found["blocks.0-2.mlp.w_up"].count == 3
    )
    up = found["blocks.3-60.mla.w_kv_up"]
    assert up.axes == "[kv_rank@dp, heads@tp, kv_dim]" and up.local == (64, 32, 256)
    assert found["mtp.0.w_h"].axes == "[embed@dp, act_embed]"
