"""Sparse attention: its definition, its operators, any mesh, and generation."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.redistribute import full
from dtron.distributed.simulated_ranks import simulated
from dtron.errors import UserError
from dtron.generation.cached_model import page_bytes
from dtron.layers import index_scores as operators
from dtron.layers import lightning_indexer
from dtron.layers.attention_core import AttentionInputs
from dtron.layers.attention_kernels import attention_and_lse, attention_flex, attention_reference
from dtron.layers.attention_mask import AttentionMask
from dtron.layers.context_parallel import own_queries
from dtron.layers.lightning_indexer import IndexerConfig
from dtron.layers.mla import MLA, MLAConfig, mla
from dtron.layers.norm import norm
from dtron.layers.rope import RopeConfig, rope_tables
from dtron.layers.sparse_attention import SparseMLA, sparse_mla
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.block_outputs import MIXER_LOSS
from dtron.model.flops import flops_per_token
from dtron.model.mtp import MTPConfig
from dtron.model.transformer import forward
from dtron.moe.config import MoEConfig
from dtron.rules import rules_for
from dtron.runtime.config import DataConfig, ModelConfig, OptimConfig, RunConfig
from dtron.runtime.validate import check
from dtron.testing import assert_caught, meshes
from dtron.training.compiled_stage import compiled
from dtron.training.gradients import gradients
from dtron.training.pipeline import one_stage, program
from dtron.training.reports import describe_mixers
from dtron.tree import flat, leaves
from tests.generation.models import MODELS, assert_cached, greedy, on_mesh, weights
from tests.helpers.examples import examples
from tests.helpers.same_step import model_config
from tests.helpers.values import F64, ONE, close, flex_on_cpu, normal, same, tree, turned
from tests.layers.test_context_parallel import assert_same_step

LATENT = MLAConfig(kv_rank=9, q_rank=11, nope_dim=6, rope_dim=4, v_dim=5)
INDEXER = IndexerConfig(heads=4, head_dim=6, top_k=5, loss=0.7)
ROPE = RopeConfig(100.0)
ROWS, SEQ = 2, 8
M = replace(MODELS["latent"], pattern="I", indexer=replace(INDEXER, top_k=3))


def weights_of(heads: int = 3) -> SparseMLA:
    sizes = LATENT.dims() | {"index_heads": INDEXER.heads, "index_dim": INDEXER.head_dim}
    return tree(SparseMLA, embed=10, heads=heads, layers=2, **sizes)


def layer(p: SparseMLA, x: Tensor, c: IndexerConfig, valid: bool = True) -> tuple[Tensor, ...]:
    places = torch.arange(SEQ).repeat(ROWS)
    inputs = AttentionInputs(
        mask=AttentionMask(SEQ, scale=0.3),
        table_TH=rope_tables(ROPE, places, LATENT.rope_dim, F64),
        valid_T=torch.arange(ROWS * SEQ) % 5 != 2 if valid else None,
        eps=1e-6,
    )
    return sparse_mla(p, x, inputs, ONE, c)


def stated(p: SparseMLA, x: Tensor, c: IndexerConfig) -> tuple[Tensor, Tensor]:
    """The layer and its loss as the report has them, one query at a time."""
    i, places = p.indexer, torch.arange(SEQ)
    y, loss = torch.zeros_like(x), torch.zeros((), dtype=F64)
    for row, h in enumerate(x.unflatten(0, (ROWS, SEQ))):
        c_q, down = norm(p.q_norm, h @ p.w_q_down, 1e-6), h @ p.w_kv_down
        latent = norm(p.kv_norm, down[:, :9], 1e-6)
        rotary = turned(down[:, None, 9:], places, ROPE)[:, 0]
        q = torch.einsum("tr,rnh->tnh", c_q, p.w_q_up)
        q = torch.cat([q[..., :6], turned(q[..., 6:], places, ROPE)], -1)
        kv = torch.einsum("tr,rnc->tnc", latent, p.w_kv_up)
        k = torch.cat([kv[..., :6], rotary[:, None].expand(-1, q.shape[1], -1)], -1)
        scores = 0.3 * torch.einsum("inh,jnh->nij", q, k)
        # The indexer, on constants.
        h, c_q = h.detach(), c_q.detach()
        key = torch.nn.functional.layer_norm(h @ i.w_k, (6,), i.k_scale, i.k_bias, 1e-6)
        turn = lambda z: torch.cat([turned(z[..., :4], places, ROPE), z[..., 4:]], -1)
        q_i, key = turn(torch.einsum("tr,rnh->tnh", c_q, i.w_q)), turn(key[:, None])[:, 0]
        w = h @ i.w_heads / (c.heads * c.head_dim) ** 0.5
        for t in range(SEQ):
            index = (w[t, :, None] * (q_i[t] @ key[: t + 1].T).relu()).sum(0)
            keep = (
                torch.arange(t + 1)
                if c.warmup
                else index.sort(descending=True, stable=True).indices[: c.top_k]
            )
            odds = scores[:, t, keep].softmax(-1)
            out = torch.einsum("nj,jnc->nc", odds, kv[keep][..., 6:])
            y[row * SEQ + t] = torch.einsum("nc,ncd->d", out, p.w_o)
            target = odds.detach().sum(0) / odds.shape[0]
            if (row * SEQ + t) % 5 != 2:
                loss = loss + (target * (target.log() - index[keep].log_softmax(-1))).sum()
    return y, loss


@pytest.mark.parametrize("c", [INDEXER, replace(INDEXER, top_k=1), replace(INDEXER, warmup=True)])
def test_it_is_the_definition(c):
    """The gradients too: of the main loss, and of the indexer's own loss."""
    p, x = weights_of(), normal(ROWS * SEQ, 10, seed=7)
    y, term, sums = layer(p, x, c)
    want_y, want_loss = stated(p, x, c)
    main = [w for path, w in leaves(p) if "indexer" not in path]
    same(y, want_y, [x, *main])
    close(sums, torch.stack([want_loss, sums[1]]))
    assert sums[1] == 13
    close(term, c.loss * want_loss)
    own = flat(p.indexer)
    got, want = (torch.autograd.grad(z, own, allow_unused=True) for z in (term / 0.7, want_loss))
    for a, b in zip(got, want, strict=True):
        close(a, torch.zeros_like(a) if b is None else b)


def leak() -> float:
    """The largest gradient of the main weights and the input in the indexer's loss, and of the
    indexer in the main loss."""
    p, x = weights_of(), normal(ROWS * SEQ, 10, seed=7)
    y, term, _ = layer(p, x, INDEXER)
    main = [x, *(w for path, w in leaves(p) if "indexer" not in path)]
    found = torch.autograd.grad(term, main, retain_graph=True, allow_unused=True)
    found += torch.autograd.grad(y.sum(), flat(p.indexer), allow_unused=True)
    return max(0.0 if g is None else g.abs().max().item() for g in found)


def test_no_gradient_leaks():
    assert leak() == 0
    with mock.patch("dtron.layers.sparse_attention.constant", lambda x: x):
        assert leak() > 1e-3


def test_all_keys_are_latent_attention():
    p, x = weights_of(), normal(ROWS * SEQ, 10, seed=7)
    places = torch.arange(SEQ).repeat(ROWS)
    table, mask = rope_tables(ROPE, places, 4, F64), AttentionMask(SEQ, scale=0.3)
    inputs = AttentionInputs(mask=mask, table_TH=table, eps=1e-6)
    of_mla = MLA(**{name: getattr(p, name) for name in vars(p) if name != "indexer"})
    want = mla(of_mla, x, inputs, ONE)
    close(layer(p, x, replace(INDEXER, top_k=SEQ), valid=False)[0], want)
    close(layer(p, x, replace(INDEXER, warmup=True), valid=False)[0], want)
    assert (layer(p, x, INDEXER, valid=False)[0] - want).abs().max() > 1e-3


# ---- operators


@pytest.mark.parametrize("at_once", [1 << 27, 100])
def test_scores_in_parts_are_the_reference(at_once):
    q, k, w = normal(2, 7, 3, 4), normal(2, 9, 4, seed=1), normal(2, 7, 3, seed=2)
    with mock.patch.object(operators, "NUMBERS_AT_ONCE", at_once):
        got = operators.index_scores(q, k, w)
        same(got, operators.index_scores_reference(q, k, w), [q, k, w])


def test_equal_scores_are_selected_in_order():
    low, never = -1.0, float("-inf")
    scores = torch.tensor(
        [[0, 2, 0, 0, never], [low, never, never, never, never], [3, 3, 3, 3, 3]], dtype=F64
    )
    want = [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]
    for at_once in (1 << 27, 1):
        with mock.patch.object(operators, "NUMBERS_AT_ONCE", at_once):
            got = operators.select_keys(scores, 3)
        assert torch.equal(got, torch.tensor(want, dtype=torch.bool))


def test_the_sum_of_heads_in_parts():
    q, k = normal(2, 3, 7, 4).detach(), normal(2, 3, 7, 4, seed=1).detach()
    sees = torch.ones(7, 7, dtype=torch.bool).tril()[None]
    scores = (q @ k.mT * 0.5).masked_fill(~sees[:, None], float("-inf"))
    with mock.patch.object(operators, "NUMBERS_AT_ONCE", 50):
        close(operators.attention_weights(q, k, sees, 0.5, None), scores.softmax(-1).sum(1))


@pytest.mark.parametrize("seq_len", [64, 300])
def test_flex_skips_blocks_that_nobody_selects(seq_len):
    """Its blocks of a choice, and the reference. Some blocks before the diagonal are empty."""
    q, k, v = (normal(2, 2, seq_len, 16, seed=i) for i in range(3))
    scores = torch.randn(2 * seq_len, seq_len, generator=torch.Generator().manual_seed(4))
    scores[:, 140:270] -= 100
    places = torch.arange(seq_len)
    scores = scores.masked_fill(places > places.repeat(2)[:, None], float("-inf"))
    chosen = operators.select_keys(scores, 5).unflatten(0, (2, -1))
    mask = AttentionMask(seq_len, selected=chosen)
    with flex_on_cpu():
        got = attention_flex(q, k, v, None, None, mask)
        same(got, attention_reference(q, k, v, None, None, mask), [q, k, v])
    close(attention_and_lse(q, k, v, None, mask)[0], got)


# ---- meshes


def configured(mesh: str, documents: bool = False, **choices) -> RunConfig:
    shape = MeshShape.parse(mesh)
    default = dict(mla=LATENT, pattern="I", heads=4, kv_heads=4, mlp=24, seed=3, indexer=INDEXER)
    batch = dict(batch=2 * shape.pp * shape.data, micro_batch=1)
    config = model_config(mesh, 1, **default | batch | choices)
    return replace(config, data=DataConfig(seq_len=16, document_mask=documents))


MOE = MoEConfig(4, 2, 8)
STEPS = [
    ("tp=2", {"zero": 0, "optim": OptimConfig(qk_clip=0.1)}),
    ("dp=2,tp=2", {"zero": 3, "documents": True, "recompute": "full"}),
    ("dp=3", {"zero": 2, "recompute": "selective"}),
    ("cp=2,tp=2", {"zero": 3, "documents": True, "cp_method": "allgather", "recompute": "full"}),
    ("cp=2,tp=2", {"zero": 1, "documents": True, "cp_method": "ulysses"}),
    ("cp=4", {"cp_method": "allgather", "zigzag": "off", "window": 7}),
    ("pp=2,tp=2", {"layers": 3, "pattern": "IM", "recompute": "selective"}),
    ("pp=2,cp=2", {"layers": 2, "cp_method": "ulysses", "zero": 3, "documents": True}),
    ("dp=2,ep=2", {"moe": MOE, "mtp": MTPConfig(1), "recompute": "full"}),
    ("cp=2,tp=2", {"cp_method": "allgather", "indexer": replace(INDEXER, warmup=True)}),
]


@pytest.mark.parametrize(("mesh", "choices"), STEPS)
def test_a_step_is_that_of_one_device(mesh, choices):
    assert_same_step(configured(mesh, **choices))


@pytest.mark.slow
@settings(max_examples=examples(5, thorough=60))
@given(
    mesh=meshes(8, ("dp", "cp", "tp")),
    method=st.sampled_from(["allgather", "ulysses"]),
    zigzag=st.sampled_from(["on", "off"]),
    documents=st.booleans(),
    top_k=st.sampled_from([1, 3, 11, 40]),
    warmup=st.booleans(),
    zero=st.sampled_from([0, 1, 2, 3]),
    recompute=st.sampled_from(["none", "selective", "full"]),
    seed=st.integers(0, 99),
)
def test_any_step(mesh, method, zigzag, documents, top_k, warmup, zero, recompute, seed):
    shape = MeshShape.parse(mesh)
    indexer = replace(INDEXER, heads=2 * shape.tp, top_k=top_k, warmup=warmup)
    heads = shape.tp * shape.cp
    config = configured(
        mesh,
        documents,
        indexer=indexer,
        heads=heads,
        kv_heads=heads,
        cp_method=method,
        zigzag=zigzag,
        zero=zero,
        recompute=recompute,
        seed=seed,
    )
    assert_same_step(replace(config, data=replace(config.data, seq_len=4 * shape.cp * shape.tp)))


visible = lightning_indexer.visible


def own_keys(documents_T, mask, layout, device) -> Tensor:
    """Mutant: a query chooses among the keys of its own rank."""
    sees = visible(documents_T, mask, layout, device)
    if isinstance(mask, AttentionMask):
        return sees
    own = own_queries(mask, layout).queries
    return sees & (torch.arange(sees.shape[-1])[:, None] == own[0]).any(-1)


def all_documents(documents_T, mask, layout, device) -> Tensor:
    """Mutant: on several ranks a query chooses among the keys of all documents."""
    alone = isinstance(mask, AttentionMask)
    return visible(documents_T if alone else None, mask, layout, device)


MUTANTS = {
    "scores are not summed over tp": ("tp=2", "SUMMANDS", lightning_indexer.PAIRS),
    "keys of the own rank alone": ("cp=2", "visible", own_keys),
    "documents are crossed": ("cp=2", "visible", all_documents),
    "keys are in the order of the ranks": ("cp=2", "in_row_order", lambda x, mask: x),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants(name):
    mesh, attribute, mutant = MUTANTS[name]
    config = configured(mesh, True, cp_method="allgather")
    with mock.patch.object(lightning_indexer, attribute, mutant):
        assert_caught(lambda: assert_same_step(config))


@pytest.mark.parametrize("documents", [False, True])
def test_validation_over_cp(documents):
    """Known bug here: it asks for the default method over cp, which is a ring."""
    rows = torch.arange(4 * 17).view(4, 17) * 7 % 61
    of_rows = (rows[:, :-1] % 5 == 0).cumsum(1) if documents else None

    @torch.no_grad()
    def loss(layout: Layout) -> Tensor:
        (params,) = weights(M, layout)
        return full(forward(params, make_batch(rows, layout, of_rows), M, layout))

    want = loss(ONE)
    with simulated(MeshShape.parse("cp=2")) as device_mesh:
        close(loss(Layout(device_mesh)), want)


def test_the_report_is_that_of_one_device():
    m = replace(M, layers=2, heads=4)
    rows = torch.arange(4 * 17).view(4, 17) * 7 % 61

    def reported(layout: Layout) -> Tensor:
        batch = make_batch(rows, layout)
        pipe = one_stage(m, 1, layout)
        _, _, reports = gradients(program(m, layout), weights(m, layout), [batch], 64, pipe, 0)
        return reports[0][MIXER_LOSS[1]]

    want = reported(ONE)
    with simulated(MeshShape.parse("dp=2,tp=2")) as device_mesh:
        got = reported(Layout(device_mesh, rules_for(0)))
        got = got.reconcile() if hasattr(got, "reconcile") else got
    close(got, want)
    assert (want[:, 0] > 0).all() and (want[:, 1] == 64).all()
    names = describe_mixers(want, m)
    assert names == {f"indexer.{i}.loss": pytest.approx(want[i, 0].item() / 64) for i in range(2)}


def test_a_compiled_stage():
    """The tracer sees through the layer. Compiled gradients are eager gradients."""

    batch = make_batch(torch.arange(34).view(2, 17) % 61, ONE)
    pipe, params, found = one_stage(M, 1, ONE), weights(M), []
    for functions in (program(M, ONE), compiled(program(M, ONE), ONE, backend="aot_eager")):
        loss, grads, _ = gradients(functions, params, [batch], 32, pipe, 0)
        found.append([loss, *flat(grads)])
    for want, got in zip(*found, strict=True):
        close(got, want)


# ---- generation


@pytest.mark.parametrize("top_k", [1, 3, 50])
def test_the_cache_changes_nothing(top_k):
    """Rows of unequal lengths, in pieces."""
    assert_cached(replace(M, indexer=replace(INDEXER, top_k=top_k)))


def test_keys_that_are_not_cached_are_noticed():
    lost = lambda index, inputs, layout, c: right(
        index, replace(inputs, cache=replace(inputs.cache, index_PSH=empty(inputs))), layout, c
    )
    right, empty = lightning_indexer.page_scores, lambda x: torch.zeros_like(x.cache.index_PSH)
    with mock.patch("dtron.layers.sparse_attention.page_scores", lost):
        assert_caught(lambda: assert_cached(M))


@pytest.mark.parametrize("mesh", ["tp=2", "dp=2"])
def test_generation_on_a_mesh(mesh):
    m = replace(M, heads=4, kv_heads=4)
    want = greedy(m, weights(m), one_stage(m, 1, ONE))
    with simulated(MeshShape.parse(mesh)) as device_mesh:
        assert on_mesh(m, mesh, Layout(device_mesh), device_mesh) == want


def test_a_page_has_latents_and_keys():
    a_token = (M.mla.kv_rank + M.mla.rope_dim + M.indexer.head_dim) * 8
    assert page_bytes(M, one_stage(M, 1, ONE), 4, F64) == M.layers * 4 * a_token


# ---- sizes and refusals


def test_flops_count_the_selected_keys():
    """The first 3 of 64 tokens attend to fewer keys than 3: 1, 2 and 3 on average 1.5."""
    dense = replace(M, indexer=replace(M.indexer, warmup=True))
    a_key = 6 * M.heads * (M.mla.qk_dim + M.mla.v_dim) * M.layers
    fewer = 32 - (3 - 9 / 128)
    assert flops_per_token(dense, 64) - flops_per_token(M, 64) == pytest.approx(fewer * a_key)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: IndexerConfig(top_k=0), "sizes are at least 1"),
        (lambda: IndexerConfig(loss=0.0), r"loss=0.0.*lr=0x"),
        (lambda: ModelConfig(pattern="I"), "give --model.mla.kv-rank"),
        (lambda: replace(M, mla=replace(M.mla, q_rank=0)), "give --model.mla.q-rank"),
        (lambda: replace(M, indexer=IndexerConfig(4, 3)), "--model.indexer.head-dim 4"),
        (
            lambda: check(replace(M, indexer=IndexerConfig(6, 6)), MeshShape(tp=4), 64),
            "indexer.heads=6 over tp=4",
        ),
        (lambda: check(M, MeshShape(cp=2), 64), "ring over cp=2.*allgather"),
    ],
)
def test_what_does_not_fit_is_one_line(make, says):
    with pytest.raises(UserError, match=says) as error:
        make()
    assert "\n" not in str(error.value)
