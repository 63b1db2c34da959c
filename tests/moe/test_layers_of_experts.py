"""The router, the dispatchers and the experts on one device, against independent definitions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtron.fp8.grouped_mm import grouped, looped, masked
from dtron.layers.mlp import Activation
from dtron.model import block
from dtron.model.batch import make_batch
from dtron.model.config import ModelConfig
from dtron.model.transformer import Transformer, declare_model, predict
from dtron.moe.config import MoEConfig
from dtron.moe.dispatch import ExpertGroup, local, static
from dtron.moe.experts import Experts, compute
from dtron.moe.layer import shared_expert
from dtron.moe.permutation import by_expert, by_room
from dtron.moe.router import Router, TokenInfo, route
from dtron.params import init
from dtron.testing import assert_caught
from tests.helpers.values import F64, ONE, close


def random_layer(tokens: int, experts: int, k: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(shape, generator=g, dtype=F64).requires_grad_()
    e = Experts(make(experts, 6, 5), make(experts, 6, 5), make(experts, 5, 6), None, None, None)
    index = torch.stack([torch.randperm(experts, generator=g)[:k] for _ in range(tokens)])
    return e, make(tokens, 6), torch.rand(tokens, k, generator=g, dtype=F64).requires_grad_(), index


def by_definition(
    e: Experts, x: Tensor, weights: Tensor, index: Tensor, kept: Tensor, on_inputs: bool
) -> Tensor:
    rows = []
    for t in range(len(x)):
        y = x[t] * 0
        for w, i, keep in zip(weights[t], index[t], kept[t], strict=True):
            if keep:
                before, after = (w, 1.0) if on_inputs else (1.0, w)
                row = before * x[t]
                h = torch.nn.functional.silu(row @ e.w_gate[i]) * (row @ e.w_up[i])
                y = y + after * (h @ e.w_down[i])
        rows.append(y)
    return torch.stack(rows)


def most_weighted(weights: Tensor, index: Tensor, experts: int, room: int) -> Tensor:
    """The slots with the largest weights of each expert."""
    kept = torch.zeros_like(index, dtype=torch.bool)
    for i in range(experts):
        slots = sorted((-weights[t, j].item(), t, j) for t, j in (index == i).nonzero().tolist())
        for _, t, j in slots[:room]:
            kept[t, j] = True
    return kept


@settings(max_examples=25)
@given(
    tokens=st.integers(1, 20),
    experts=st.integers(1, 7),
    k=st.integers(1, 4),
    seed=st.integers(0, 99),
    capacity=st.sampled_from([None, 0.0, 0.5, 1.0, 100.0]),
    on_inputs=st.booleans(),
)
def test_dispatchers_by_definition(tokens, experts, k, seed, capacity, on_inputs):
    """No token is dropped. With too little capacity, exactly the slots with the smallest weights
    are dropped."""
    k = min(k, experts)
    e, x, weights, index = random_layer(tokens, experts, k, seed)
    room = tokens if not capacity else min(tokens, math.ceil(capacity * tokens * k / experts))
    kept = most_weighted(weights, index, experts, room)
    run = lambda rows, ends: compute(e, rows, ends, "swiglu")
    dispatch, over = (
        (local if capacity is None else static),
        ExpertGroup(experts, None, capacity or 0.0, on_inputs),
    )
    got, lost = dispatch(x, weights, index, torch.tensor(0), run, over)
    want = by_definition(e, x, weights, index, kept, on_inputs)
    torch.testing.assert_close(got, want)
    assert (0 if lost is None else lost) == (~kept).sum()
    inputs = [x, weights, e.w_gate, e.w_up, e.w_down]
    slope = torch.randn(want.shape, dtype=F64)
    slopes = [torch.autograd.grad(y, inputs, slope, allow_unused=True) for y in (got, want)]
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(1, 9))
def test_plans(experts, room):
    """Rows sorted by expert hold every slot once. Rows with capacity hold the slots of each expert
    and no other slot."""
    expert_S = torch.tensor(experts)
    plan, ends = by_expert(expert_S, 5)
    assert expert_S[plan.slot_R].tolist() == sorted(experts)
    assert plan.slot_R[plan.place_S].tolist() == list(range(len(experts)))
    assert ends.tolist() == [sum(i <= e for i in experts) for e in range(5)]
    plan = by_room(expert_S, torch.rand(len(experts)), 5, room)
    assert plan.filled_R.view(5, room).sum(1).tolist() == [
        min(experts.count(e), room) for e in range(5)
    ]
    for row, (slot, filled) in enumerate(
        zip(plan.slot_R.tolist(), plan.filled_R.tolist(), strict=True)
    ):
        assert not filled or (expert_S[slot] == row // room and plan.place_S[slot] == row)
    assert plan.kept_S.sum() == plan.filled_R.sum()


def logits_router(
    logits: Tensor, c: MoEConfig, balance: Tensor | None = None, valid=None, rows=None
):
    """The router on tokens with given logits."""
    n, e = logits.shape
    valid = torch.ones(n, dtype=torch.bool) if valid is None else valid
    rows = torch.zeros(n, dtype=torch.long) if rows is None else rows
    w = torch.eye(e, dtype=logits.dtype)
    info = TokenInfo(valid, rows, int(rows.max()) + 1, torch.arange(n))
    return route(Router(w, None, balance), logits, info, c, ONE)


def test_scores():
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]], dtype=F64)
    p, s = logits.softmax(-1)[0].tolist(), logits.sigmoid()[0].tolist()

    def first(**choices):
        return logits_router(logits, MoEConfig(4, 2, **choices)).weights_TK[0].tolist()

    assert first(normalize=False) == pytest.approx([p[1], p[2]])
    assert first() == pytest.approx([p[1] / (p[1] + p[2]), p[2] / (p[1] + p[2])])
    assert first(score="topk_softmax") == pytest.approx(first())
    assert first(score="sigmoid", scale=2.5) == pytest.approx(
        [2.5 * s[1] / (s[1] + s[2]), 2.5 * s[2] / (s[1] + s[2])]
    )


@pytest.mark.parametrize("low", [-30.0, -90.0, -200.0, -1e4])
def test_scores_that_are_all_zero_in_their_dtype(low):
    """Sigmoids of very negative logits. Known bug of other trainers: the auxiliary loss is 0 / 0,
    and so are the gradients."""
    logits = (torch.randn(6, 4) + low).requires_grad_()
    c = MoEConfig(4, 2, score="sigmoid", aux_loss=1.0, scale=2.5)
    to = logits_router(logits, c)
    (slope,) = torch.autograd.grad(to.aux + to.weights_TK[:, 0].sum(), logits)
    assert slope.isfinite().all() and slope.abs().max() > 1e-3
    torch.testing.assert_close(to.weights_TK.sum(-1), torch.full((6,), 2.5))
    assert 0 < to.aux.item() < 6 * 4


def test_a_balance_bias_chooses_and_does_not_weigh():
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]], dtype=F64)
    c = MoEConfig(4, 2, score="sigmoid", normalize=False, bias_rate=1e-3)
    to = logits_router(logits, c, torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert sorted(to.index_TK[0].tolist()) == [1, 3]
    torch.testing.assert_close(to.weights_TK, logits.sigmoid().gather(1, to.index_TK))


def test_groups_limit_where_a_token_goes():
    """The best two experts of the best group, although the second best expert of all is in another
    group. By sigmoid a group's score is the sum of its best two, by softmax its best."""
    logits = torch.tensor([[2.0, 1.9, 2.1, -3.0, 0.0, 0.0]], dtype=F64)

    def chosen(**c):
        return sorted(logits_router(logits, MoEConfig(6, 2, groups=3, **c)).index_TK[0].tolist())

    assert chosen(score="sigmoid", group_top_k=1) == [0, 1]
    assert chosen(score="softmax", group_top_k=1) == [2, 3]
    assert chosen(score="softmax", group_top_k=2) == [0, 2]


def test_the_auxiliary_loss_by_its_formula():
    """Per token the loss is 1 under an even load, and E/k when all tokens choose the same experts.
    Every level, by hand."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 4, generator=g, dtype=F64)
    valid, rows = torch.arange(12) % 4 != 3, torch.arange(12) // 6
    p, top = logits.softmax(-1), logits.topk(2, -1).indices
    hot = torch.zeros(12, 4, dtype=F64).scatter(1, top, 1.0)
    sets = {"micro_batch": [valid], "sequence": [valid & (rows == r) for r in (0, 1)]}
    for level, masks in sets.items():
        want = sum(m.sum() * 4 * (hot[m].mean(0) / 2 * p[m].mean(0)).sum() for m in masks)
        to = logits_router(
            logits, MoEConfig(4, 2, aux_loss=0.5, aux_level=level), valid=valid, rows=rows
        )
        assert to.aux.item() == pytest.approx(0.5 * want.item(), rel=1e-12)
    z = (logits[valid].logsumexp(-1) ** 2).sum()
    assert logits_router(
        logits, MoEConfig(4, 2, z_loss=0.1), valid=valid
    ).aux.item() == pytest.approx(0.1 * z.item())
    even = torch.eye(4, dtype=F64).repeat(3, 1) * 1e-6
    assert logits_router(even, MoEConfig(4, 1, aux_loss=1.0)).aux.item() / 12 == pytest.approx(
        1, rel=1e-4
    )
    peaked = torch.tensor([[90.0, 0, 0, 0]], dtype=F64).repeat(12, 1)
    assert logits_router(peaked, MoEConfig(4, 1, aux_loss=1.0)).aux.item() / 12 == pytest.approx(
        4, rel=1e-9
    )


def test_counts_are_of_tokens_that_count():
    """Known bug elsewhere: a padding mask doubled the router's counts."""
    logits = torch.randn(12, 4, dtype=F64)
    valid = torch.arange(12) < 7
    for counted in (valid, torch.ones(12, dtype=torch.bool)):
        to = logits_router(logits, MoEConfig(4, 2, aux_loss=1.0), valid=counted)
        assert to.load_E.sum() == 2 * counted.sum() and to.totals[0] == counted.sum()
        assert to.index_TK.shape == (12, 2)  # padding goes to experts too


def test_forced_balance():
    to = logits_router(torch.randn(24, 8, dtype=F64), MoEConfig(8, 3, balanced=True))
    assert to.load_E.tolist() == [9.0] * 8


@settings(max_examples=15)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 5), st.integers(0, 99))
def test_products_agree(counts, rest, seed):
    """The grouped kernel, the loop and the compiled form, with rows behind the last end; gradients
    too."""
    g = torch.Generator().manual_seed(seed)
    rows, n = sum(counts) + rest + 1, sum(counts)
    ends = torch.tensor(counts).cumsum(0)
    x, w = torch.randn(rows, 16, generator=g), torch.randn(len(counts), 16, 8, generator=g)
    found = []
    for fn, dtype in ((looped, torch.float32), (masked, torch.float32), (grouped, torch.bfloat16)):
        a, b = x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
        y = fn(a, b, ends)[:n]
        slopes = torch.autograd.grad(y, [a, b], torch.ones_like(y))
        found.append([t.float() for t in (y, slopes[0][:n], slopes[1])])
    for want, same, low in zip(*found, strict=True):
        torch.testing.assert_close(same, want)
        torch.testing.assert_close(low, want, rtol=0.05, atol=0.1)


# ---- the shared expert

DENSE = ModelConfig(
    vocab=31, embed=8, layers=2, heads=2, kv_heads=1, head_dim=4, mlp=12, context=16
)
WITH_EXPERTS = replace(DENSE, moe=MoEConfig(4, 2, 5, shared=12))


def shared_only(p: Transformer, dense: Transformer) -> Transformer:
    """Put the weights of a dense model into ``p``. Its feed-forward layers become the shared
    experts, and the routed experts give zero."""
    blocks = [
        replace(
            theirs,
            mlp=None,
            moe=replace(
                own.moe,
                experts=replace(own.moe.experts, w_down=torch.zeros_like(own.moe.experts.w_down)),
                shared=theirs.mlp,
            ),
        )
        for own, theirs in zip(p.blocks, dense.blocks, strict=True)
    ]
    return replace(dense, blocks=blocks)


def assert_shared_is_dense(activation: str) -> None:
    models = [replace(m, activation=activation, init_std=0.3) for m in (DENSE, WITH_EXPERTS)]
    dense, own = (init(declare_model(m), m.dims(), 3, ONE, F64) for m in models)
    batch = make_batch(torch.arange(22).view(2, 11), ONE)
    want = predict(dense, batch, models[0], ONE)
    close(predict(shared_only(own, dense), batch, models[1], ONE), want)


@pytest.mark.parametrize("activation", get_args(Activation))
def test_a_shared_expert_has_the_activation_of_the_model(activation):
    """Known bug of other trainers, and once of this one: a shared expert is always SwiGLU."""
    assert_shared_is_dense(activation)


def test_another_activation_of_the_shared_expert_is_caught():
    wrong = lambda p, x, layout, activation, recipe: shared_expert(p, x, layout, "swiglu", recipe)
    with mock.patch.object(block, "shared_expert", wrong):
        assert_caught(lambda: assert_shared_is_dense("geglu"))
