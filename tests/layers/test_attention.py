"""The attention layer against einsum, and which tokens of a model see which tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dtron.layers.attention import Attention, AttentionInputs, attention
from dtron.layers.attention_mask import AttentionMask
from dtron.layers.rope import RopeConfig, rope_tables
from dtron.model.batch import make_batch
from dtron.model.transformer import declare_model, predict
from dtron.params import init
from dtron.runtime.config import ModelConfig
from dtron.tree import flat
from tests.helpers.values import F64, ONE, SMALL, close, flex_on_cpu, normal, same, tree, turned


@pytest.fixture(autouse=True, scope="module")
def _flex():
    with flex_on_cpu():
        yield


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_layer(extras, softcap):
    """Projections, biases, norms of queries and keys, rotation, groups, sinks, gate and output,
    in einsum."""
    dims = dict(embed=10, heads=4, kv_heads=2, head_dim=6)
    dims |= dict.fromkeys(("qk_norm", "qkv_bias", "bias", "sinks", "attention_gate"), extras)
    dims["qk_heads_norm"] = False
    p, s, positions, x = tree(Attention, **dims), 5, torch.arange(5).repeat(2), normal(10, 10)
    table, mask = rope_tables(RopeConfig(), positions, 6, F64), AttentionMask(s, softcap=softcap)
    got = attention(p, x, AttentionInputs(table_TH=table, mask=mask, eps=0.1), ONE)
    q, k, v = (torch.einsum("td,dnh->tnh", x, w) for w in (p.w_q, p.w_k, p.w_v))
    if extras:
        q, k, v = q + p.b_q, k + p.b_k, v + p.b_v
        q, k = F.rms_norm(q, (6,), p.q_norm.scale, 0.1), F.rms_norm(k, (6,), p.k_norm.scale, 0.1)
    q, k = turned(q, positions, RopeConfig()), turned(k, positions, RopeConfig())
    q, k, v = (
        q.view(2, s, 2, 2, 6),
        k.view(2, s, 2, 6),
        v.view(2, s, 2, 6),
    )  # queries: key head, then group
    scores = torch.einsum("bikgh,bjkh->bkgij", q, k) / math.sqrt(6)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    odds = scores.exp().tril()
    sink = p.sinks.exp().view(2, 2, 1, 1) if extras else 0
    share = odds / (odds.sum(-1, keepdim=True) + sink)
    o = torch.einsum("bkgij,bjkh->bikgh", share, v).reshape(-1, 4, 6)
    if extras:
        o = o * torch.einsum("td,dnh->tnh", x, p.w_gate).sigmoid()
    same(got, torch.einsum("tnh,nhd->td", o, p.w_o) + (p.b_o if extras else 0), [x, *flat(p)])


def test_grouped_queries_are_repeated_keys_and_values():
    p, x = tree(Attention, embed=10, heads=6, kv_heads=2, head_dim=4), normal(8, 10)
    repeated = replace(p, w_k=p.w_k.repeat_interleave(3, 1), w_v=p.w_v.repeat_interleave(3, 1))
    inputs = AttentionInputs(mask=AttentionMask(4))
    grouped, plain = (attention(w, x, inputs, ONE) for w in (p, repeated))
    same(grouped, plain, [x, *flat(p)])


def logits(model: ModelConfig, rows: Tensor, **data) -> Tensor:
    p = init(declare_model(model), model.dims(), 3, ONE, F64)
    return predict(p, make_batch(rows, ONE, **data), model, ONE).view(len(rows), -1, model.vocab)


@pytest.mark.parametrize(
    "changes",
    [{}, {"softcap": 1.0}, {"window": 20}, {"positions": "learned"}, {"sinks": True, "window": 5}],
)
def test_tokens_see_no_later_token_and_no_other_document(changes):
    """In the whole model. With positions that restart, a document of a packed row has the logits
    that it has alone."""
    model, rows = replace(SMALL, init_std=0.3, **changes), torch.arange(22).view(2, 11)
    changed = rows.clone()
    changed[1, 6] = 49
    before, after = logits(model, rows), logits(model, changed)
    assert before[0].equal(after[0]) and before[1, :6].equal(after[1, :6])
    assert ((before - after)[1, 6:].abs().amax(-1) > 1e-3).all()
    documents, restart = (
        torch.tensor([[0] * 4 + [1] * 6] * 2),
        torch.tensor([[*range(4), *range(6)]] * 2),
    )
    packed = logits(model, rows, documents_BS=documents, positions_BS=restart)
    close(packed[:, :4], logits(model, rows[:, :5]))
    close(packed[:, 4:], logits(model, rows[:, 4:]))
