"""Multi-head latent attention: the same on every mesh, what it communicates, and what it computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_communication import counts
from test_equivalence import ATTENTION_INPUTS, attention_values, tp_of

from dtron.collectives import Collective
from dtron.layers.cores import Mask
from dtron.layers.mla import MLA, Latent, mla
from dtron.layers.rope import Rope, rope_tables
from dtron.shape import MeshShape
from dtron.testing import assert_caught, assert_equivalent, dropped, meshes, run_layer, unsummed, zero_stages

LATENT = Latent(kv_rank=9, q_rank=11, nope_dim=6, rope_dim=4, v_dim=5)
YARN = Rope(100.0, "yarn", 4.0, 32, beta_fast=2.0, mscale=0.7, mscale_all=0.7)


def dims_of(latent: Latent, heads: int) -> dict:
    return {"embed": 10, "heads": heads, "layers": 2, "layernorm": False, **latent.dims()}


def attend(mask: Mask, latent: Latent, path: str = "auto"):
    def layer(p, x, positions, documents, layout):
        make = lambda t: rope_tables(YARN, t, latent.rope_dim, torch.float64)
        table = layout.local(make, (("tokens",),), ("tokens", None))(positions)
        return mla(p, x, table, documents, mask, layout, path=path)

    return layer


def options(sequence: int, tokens: int) -> dict:
    return dict(inputs=ATTENTION_INPUTS, make=attention_values(sequence, tokens), tokens=tokens)


@settings(max_examples=15)
@given(
    mesh=meshes(), zero=zero_stages(), seed=st.integers(0, 99), group=st.sampled_from([1, 2]),
    path=st.sampled_from(["sdpa", "reference"]), window=st.sampled_from([None, 5]),
    q_rank=st.sampled_from([0, 11]), v_dim=st.sampled_from([5, 10, 13]),
)  # fmt: skip
def test_mla(mesh, zero, seed, group, path, window, q_rank, v_dim):
    """Values narrower than keys, as wide and wider; ranks that no mesh divides."""
    tokens = (8 if MeshShape.parse(mesh).data not in (3, 6) else 6) * 12
    latent = replace(LATENT, q_rank=q_rank, v_dim=v_dim)
    assert_equivalent(
        attend(Mask(12, window, scale=0.2), latent, path), MLA, mesh, dims_of(latent, group * tp_of(mesh)),
        zero=zero, seed=seed, **options(12, tokens),
    )  # fmt: skip


@pytest.mark.parametrize("q_rank", [0, 11])
@pytest.mark.parametrize("mutant", [dropped(0), dropped(1), unsummed])
def test_mla_mutants(mutant, q_rank):
    """``unsummed``: the rotary key is shared, and each rank has its own heads' part of its gradient."""
    latent = replace(LATENT, q_rank=q_rank)
    check = lambda m: assert_equivalent(
        attend(Mask(12), latent), MLA, "dp=2,tp=2", dims_of(latent, 4), mutate=m, **options(12, 48)
    )
    check(lambda layout: layout)
    assert_caught(lambda: check(mutant))


@pytest.mark.parametrize("mesh", ["tp=2", "dp=2,tp=2", "dp_replicate=2,tp=2"])
@pytest.mark.parametrize("q_rank", [0, 11])
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_mla_gathers_its_latents_and_scatters_its_tokens_once_each_way(mesh, q_rank, zero):
    latent, dp = replace(LATENT, q_rank=q_rank), MeshShape.parse(mesh).dp > 1
    got = run_layer(attend(Mask(12), latent), MLA, mesh, dims_of(latent, 4), zero=zero, **options(12, 48))
    matrices = 5 if q_rank else 4
    gathered = matrices if zero == 3 and dp else 0
    assert got.forward.count == counts(all_gather_tp=1, reduce_scatter_tp=1, all_gather_dp=gathered)
    tp = {c: n for c, n in got.total.count.items() if c.axis == "tp" and c.kind != "all_reduce"}
    assert tp == counts(all_gather_tp=2, reduce_scatter_tp=2)
    # What is whole on tp ranks, summed at the end: down-projections, and with the norms end to end what no dp
    # cuts.
    cut = (2 if q_rank else 1) if zero and dp else 0
    assert got.total.count[Collective("all_reduce", "tp")] == 1 + cut
