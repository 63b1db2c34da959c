"""Each layer on one device against a definition written independently of it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from values import F64, ONE, SMALL, close, normal

from dtron.config import ModelConfig
from dtron.layers.attention import Attention, Mask, attention, attention_fused, attention_reference
from dtron.layers.embedding import Embedding, embedding
from dtron.layers.linear import linear, linear_in
from dtron.layers.loss import IGNORE, Loss, cross_entropy
from dtron.layers.mlp import MLP, mlp
from dtron.layers.norm import Norm, norm
from dtron.layers.rope import Rope, frequencies, rope_tables, rotate
from dtron.model import declare_model, make_batch, predict
from dtron.params import declare, flat, init, tree_map


def tree(cls: type, **dims):
    """Random weights, away from the ones and zeros where mistakes hide."""
    absent = ("qk_norm", "qkv_bias", "bias", "layernorm", "learned_positions")
    spec = declare(cls, dict.fromkeys(absent, False) | dims)
    return tree_map(lambda w: normal(*w.shape, seed=sum(w.path.encode())), spec)


def same(got: Tensor, want: Tensor, inputs: list[Tensor]) -> None:
    """Equal values, and equal gradients of every input along one random direction."""
    close(got, want)
    direction = normal(*want.shape, seed=99).detach()
    close(torch.autograd.grad(got, inputs, direction), torch.autograd.grad(want, inputs, direction))


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_norms(eps):
    x, rms, ln = normal(4, 3, 10), tree(Norm, embed=10), tree(Norm, embed=10, layernorm=True)
    same(norm(rms, x, eps), F.rms_norm(x, (10,), rms.scale, eps), [x, rms.scale])
    same(norm(ln, x, eps), F.layer_norm(x, (10,), ln.scale, ln.bias, eps), [x, ln.scale, ln.bias])


@pytest.mark.parametrize("layernorm", [False, True])
def test_bfloat16_norms_have_float32_statistics(layernorm):
    """Off by the rounding of the result and no more; a bfloat16 mean of values around 100 is off by far."""
    dims = {"embed": 1024, "layernorm": layernorm}
    x = (normal(64, 1024) + 100 * layernorm).bfloat16()
    y = norm(init(declare(Norm, dims), dims, 0, ONE, torch.bfloat16), x)
    want = F.layer_norm(x.to(F64), (1024,)) if layernorm else F.rms_norm(x.to(F64), (1024,), eps=1e-5)
    assert y.dtype == torch.bfloat16 and ((y - want).abs() <= 2**-8 * 1.001 * want.abs() + 1e-4).all()


ROPES = [Rope(), Rope(100.0, "llama3", 4.0, 64), Rope(100.0, "yarn", 4.0, 64, beta_fast=4.0)]


def turned(x: Tensor, positions: Tensor, rope: Rope) -> Tensor:
    """Pairs (i, i + H/2) as complex numbers, times e^(i angle)."""
    freq, scale = frequencies(rope, x.shape[-1], F64)
    z = torch.complex(*x.chunk(2, dim=-1)) * torch.exp(1j * positions[:, None, None] * freq) * scale
    return torch.cat([z.real, z.imag], dim=-1)


@settings(max_examples=30)
@given(st.sampled_from(ROPES), st.lists(st.integers(0, 5000), min_size=2, max_size=5), st.integers(0, 5000))
def test_rotation(rope, places, shift):
    """Norms stay, place 0 stays, and scores depend on distances only. Places are data: any order, any
    restart."""
    places = torch.tensor([0, *places])
    q, k = normal(len(places), 2, 16), normal(len(places), 2, 16, seed=1)
    turn = lambda x, t: rotate(x, rope_tables(rope, t, 16, F64))
    scores = lambda t: torch.einsum("inh,jnh->nij", turn(q, t), turn(k, t))
    same(turn(q, places), turned(q, places, rope), [q])
    close(scores(places), scores(places + shift))
    scale = 0.1 * math.log(4.0) + 1 if rope.scaling == "yarn" else 1.0
    close(turn(q, places).norm(dim=-1), q.norm(dim=-1) * scale)
    close(turn(q, places)[0], q[0] * scale)


def test_rotary_angles_of_bfloat16_are_float32():
    """Position 4095 would be 4096 in bfloat16."""
    table = rope_tables(Rope(), torch.tensor([4095]), 4, torch.bfloat16)
    close(table[0, 0].item(), math.cos(4095), 1e-4)
    assert rotate(normal(1, 1, 4).bfloat16(), table).dtype == torch.bfloat16


def test_rotary_frequencies():
    """Plain; Llama 3's as published, by wavelength against the original context; YaRN's ends."""
    plain = 1e4 ** -(torch.arange(0, 128, 2, dtype=F64) / 128)
    close(frequencies(Rope(), 128, F64), (plain, 1.0), 1e-14)
    wave = 2 * math.pi / plain
    smooth = ((8192 / wave - 1) / (4 - 1)).clamp(0, 1)  # 1: shorter than a 4th of the context; 0: longer
    close(
        frequencies(Rope(scaling="llama3"), 128, F64), ((1 - smooth) * plain / 8 + smooth * plain, 1.0), 1e-14
    )
    yarn, scale = frequencies(Rope(scaling="yarn"), 128, F64)
    ratio, short, long = yarn / plain, 8192 / wave >= 32, 8192 / wave <= 1
    close((ratio[short].min().item(), ratio[long].max().item(), scale), (1.0, 1 / 8, 0.1 * math.log(8) + 1))
    assert (ratio[~short & ~long].diff() < 0).all() and ratio.max() <= 1 and ratio.min() > 1 / 8.001


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("theta", 1.0),
        ("theta", -2.0),
        ("factor", 0.5),
        ("original", 0),
        ("low", 4.0),
        ("high", 1.0),
        ("beta_slow", 0.0),
        ("beta_fast", 0.5),
    ],
)
def test_bad_rope_values(name, bad):
    with pytest.raises(ValueError, match=f"{name}={bad}.*at least 1, low under high"):
        Rope(**{name: bad})


@settings(max_examples=40)
@given(
    b=st.integers(1, 3), kv=st.integers(1, 3), group=st.integers(1, 3), s=st.integers(1, 9),
    window=st.none() | st.integers(1, 10), packed=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_fused_attention_is_the_reference(b, kv, group, s, window, packed, seed):
    q, k, v = (normal(b, n, s, 4, seed=seed + 100 * i) for i, n in enumerate((kv * group, kv, kv)))
    documents = (normal(b, s, seed=seed) > 0.5).cumsum(-1) if packed else None
    fused, reference = (
        f(q, k, v, documents, Mask(s, window)) for f in (attention_fused, attention_reference)
    )
    same(fused, reference, [q, k, v])


@pytest.mark.parametrize("core", [attention_reference, attention_fused])
@pytest.mark.parametrize("documents", [None, torch.tensor([[2, 2, 2, 0, 0, 0], [0, 1, 1, 1, 1, 0]])])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_a_token_has_influence_where_it_may_be_seen_and_nowhere_else(core, documents, window):
    q, k, v = (normal(2, 2, 6, 4, seed=i) for i in range(3))
    run = lambda k, v: core(q, k, v, documents, Mask(6, window)).sum((1, 3))
    k_slope, v_slope = torch.autograd.functional.jacobian(run, (k, v))
    for x, i, y, j in product(range(2), range(6), range(2), range(6)):
        seen = x == y and j <= i and (window is None or i - j < window)
        seen = seen and (documents is None or documents[x, i] == documents[x, j])
        assert (v_slope[x, i, y, :, j] != 0).all() if seen else (v_slope[x, i, y, :, j] == 0).all()
        assert seen or (k_slope[x, i, y, :, j] == 0).all()


def test_softcap():
    """Values that are the identity give the probabilities; no two of a row differ by more than e^(2 cap)."""
    q, k, eye = 30 * normal(1, 1, 8, 8), 30 * normal(1, 1, 8, 8, seed=1), torch.eye(8, dtype=F64)[None, None]
    p = attention_reference(q, k, eye, None, Mask(8, softcap=1.5))[0, 0]
    odds = (1.5 * torch.tanh(q[0, 0] @ k[0, 0].T / math.sqrt(8) / 1.5)).exp().tril()
    close(p, odds / odds.sum(-1, keepdim=True))
    assert all(row[: i + 1].max() / row[: i + 1].min() <= math.exp(3.0) + 1e-9 for i, row in enumerate(p))
    with pytest.raises(ValueError, match="softcap=1.5.*use attention_reference"):
        attention_fused(q, k, eye, None, Mask(8, softcap=1.5))


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_layer(extras, softcap):
    """Projections, biases, norms of queries and keys, rotation, groups and output, in einsum."""
    dims = dict(embed=10, heads=4, kv_heads=2, head_dim=6, qk_norm=extras, qkv_bias=extras, bias=extras)
    p, s, positions, x = tree(Attention, **dims), 5, torch.arange(5).repeat(2), normal(10, 10)
    got = attention(
        p, x, rope_tables(Rope(), positions, 6, F64), None, Mask(s, softcap=softcap), ONE, eps=0.1
    )
    q, k, v = (torch.einsum("td,dnh->tnh", x, w) for w in (p.w_q, p.w_k, p.w_v))
    if extras:
        q, k, v = q + p.b_q, k + p.b_k, v + p.b_v
        q, k = F.rms_norm(q, (6,), p.q_norm.scale, 0.1), F.rms_norm(k, (6,), p.k_norm.scale, 0.1)
    q, k = turned(q, positions, Rope()), turned(k, positions, Rope())
    q, k, v = q.view(2, s, 2, 2, 6), k.view(2, s, 2, 6), v.view(2, s, 2, 6)  # queries: key head, then group
    scores = torch.einsum("bikgh,bjkh->bkgij", q, k) / math.sqrt(6)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    share = (scores + torch.full((s, s), -math.inf, dtype=F64).triu(1)).softmax(-1)
    o = torch.einsum("bkgij,bjkh->bikgh", share, v).reshape(-1, 4, 6)
    same(got, torch.einsum("tnh,nhd->td", o, p.w_o) + (p.b_o if extras else 0), [x, *flat(p)])


def test_grouped_queries_are_repeated_keys_and_values():
    p, x = tree(Attention, embed=10, heads=6, kv_heads=2, head_dim=4), normal(8, 10)
    repeated = replace(p, w_k=p.w_k.repeat_interleave(3, 1), w_v=p.w_v.repeat_interleave(3, 1))
    grouped, plain = (attention(w, x, None, None, Mask(4), ONE) for w in (p, repeated))
    same(grouped, plain, [x, *flat(p)])


def logits(model: ModelConfig, rows: Tensor, **data) -> Tensor:
    p = init(declare_model(model), model.dims(), 3, ONE, F64)
    return predict(p, make_batch(rows, ONE, **data), model, ONE).view(len(rows), -1, model.vocab)


@pytest.mark.parametrize("changes", [{}, {"softcap": 1.0}, {"window": 20}, {"positions": "learned"}])
def test_tokens_see_no_later_token_and_no_other_document(changes):
    """In the whole model; with positions that restart, a document of a packed row is as it is alone."""
    model, rows = replace(SMALL, init_std=0.3, **changes), torch.arange(22).view(2, 11)
    changed = rows.clone()
    changed[1, 6] = 49
    before, after = logits(model, rows), logits(model, changed)
    assert before[0].equal(after[0]) and before[1, :6].equal(after[1, :6])
    assert ((before - after)[1, 6:].abs().amax(-1) > 1e-3).all()
    documents, restart = torch.tensor([[0] * 4 + [1] * 6] * 2), torch.tensor([[*range(4), *range(6)]] * 2)
    packed = logits(model, rows, documents_BS=documents, positions_BS=restart)
    close(packed[:, :4], logits(model, rows[:, :5]))
    close(packed[:, 4:], logits(model, rows[:, 4:]))


def test_linear():
    x, w, b, y, v = normal(5, 6), normal(6, 2, 3, 4), normal(2, 3, 4), normal(5, 2, 3), normal(2, 3, 7)
    same(linear(x, w, b), torch.einsum("ti,iabc->tabc", x, w) + b, [x, w, b])
    same(linear(x, w[:, 0, 0]), torch.einsum("ti,ic->tc", x, w[:, 0, 0]), [x, w])
    same(linear_in(y, v), torch.einsum("tab,abd->td", y, v), [y, v])


def gelu(a: Tensor) -> Tensor:
    return 0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))


FORMULAS = {
    "swiglu": lambda gate, up: gate / (1 + torch.exp(-gate)) * up,
    "geglu": lambda gate, up: gelu(gate) * up,
    "gelu": lambda gate, up: gelu(up),
    "relu2": lambda gate, up: torch.where(up > 0, up * up, 0),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", FORMULAS)
def test_mlp(activation, bias):
    gated, x = activation in ("swiglu", "geglu"), normal(9, 5)
    p = tree(MLP, embed=5, mlp=8, gated=gated, bias=bias)
    up, down = (p.b_up, p.b_down) if bias else (0, 0)
    wide = FORMULAS[activation](x @ p.w_gate if gated else None, x @ p.w_up + up)
    same(mlp(p, x, ONE, activation), wide @ p.w_down + down, [x, *flat(p)])


@pytest.mark.parametrize("learned", [False, True])
def test_embedding(learned):
    p = tree(Embedding, vocab=7, embed=4, positions=5, learned_positions=learned)
    tokens, positions = torch.tensor([3, 6, 0, 3, 3]), torch.tensor([0, 1, 2, 0, 4])
    one_hot = lambda i, n: F.one_hot(i, n).to(F64)
    want = one_hot(tokens, 7) @ p.w_tokens + (one_hot(positions, 5) @ p.w_positions if learned else 0)
    same(embedding(p, tokens, positions, ONE), want, flat(p))


def test_a_batch_shifts_by_one():
    rows = torch.tensor([[5, 6, 7, 8], [9, IGNORE, 2, IGNORE]])
    batch = make_batch(rows, ONE, documents_BS=torch.tensor([[0, 0, 1], [0, 0, 0]]))
    assert batch.tokens_T.tolist() == [5, 6, 7, 9, 0, 2]  # an ignored input is some token
    assert batch.targets_T.tolist() == [6, 7, 8, IGNORE, 2, IGNORE]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1, 2]
    assert batch.documents_T.tolist() == [0, 0, 1, 0, 0, 0]
    assert batch.sequence == 3 and make_batch(rows, ONE).documents_T is None


@pytest.mark.parametrize("z", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 3, 10, 1024])
def test_cross_entropy(chunk, z):
    """The last rows of the head are padding: large, to show if they ever count."""
    x, w = normal(10, 6), torch.cat([normal(7, 6, seed=1), 50 * normal(3, 6)]).detach().requires_grad_()
    targets = torch.tensor([0, 6, IGNORE, 3, 3, IGNORE, 1, 2, 5, IGNORE])
    loss = lambda x, w: cross_entropy(x, w, targets, Loss(7, chunk, z), ONE)
    scores = x @ w[:7].T
    want = F.cross_entropy(scores, targets, reduction="sum", ignore_index=-100)
    want = want + z * (scores.logsumexp(-1).square() * (targets != -100)).sum()
    same(loss(x, w), want, [x, w])
    (slope,) = torch.autograd.grad(loss(x, w), w)
    assert (slope[7:] == 0).all() and (slope[:7] != 0).all()
    assert torch.autograd.gradcheck(loss, (x, w))
    with torch.no_grad():
        close(loss(x, w), want)


def test_ignored_targets_cost_nothing():
    x, w = normal(4, 6), normal(8, 6)
    loss = cross_entropy(x, w, torch.full((4,), IGNORE), Loss(7, 3, 0.1), ONE)
    assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, [x, w]))


def test_the_loss_of_bfloat16_is_float32():
    x, w, targets = normal(64, 32).bfloat16(), normal(100, 32).bfloat16(), torch.arange(64)
    want = F.cross_entropy((x @ w.T).float(), targets, reduction="sum")  # the dtypes must agree too
    close(cross_entropy(x, w, targets, Loss(100), ONE), want, 1e-5)
