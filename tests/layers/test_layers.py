"""Each layer on one device against an independent definition."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtron.layers.cross_entropy import IGNORE, Loss, cross_entropy, logits
from dtron.layers.embedding import Embedding, embedding
from dtron.layers.linear import linear, linear_in
from dtron.layers.mlp import MLP, mlp
from dtron.layers.norm import Norm, norm
from dtron.layers.rope import RopeConfig, frequencies, rope_tables, rotate
from dtron.model.batch import make_batch
from dtron.params import declare, init
from dtron.tree import flat
from tests.helpers.values import F64, ONE, close, normal, same, tree, turned


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_norms(eps):
    x, rms, ln = normal(4, 3, 10), tree(Norm, embed=10), tree(Norm, embed=10, layernorm=True)
    same(norm(rms, x, eps), F.rms_norm(x, (10,), rms.scale, eps), [x, rms.scale])
    same(norm(ln, x, eps), F.layer_norm(x, (10,), ln.scale, ln.bias, eps), [x, ln.scale, ln.bias])


@pytest.mark.parametrize("layernorm", [False, True])
def test_bfloat16_norms_have_float32_statistics(layernorm):
    """The error is the rounding of the result. A mean of values around 100 in bfloat16 would be far
    off."""
    dims = {"embed": 1024, "layernorm": layernorm}
    x = (normal(64, 1024) + 100 * layernorm).bfloat16()
    y = norm(init(declare(Norm, dims), dims, 0, ONE, torch.bfloat16), x)
    want = (
        F.layer_norm(x.to(F64), (1024,)) if layernorm else F.rms_norm(x.to(F64), (1024,), eps=1e-5)
    )
    assert (
        y.dtype == torch.bfloat16 and ((y - want).abs() <= 2**-8 * 1.001 * want.abs() + 1e-4).all()
    )


ROPES = [
    RopeConfig(),
    RopeConfig(100.0, "llama3", 4.0, 64),
    RopeConfig(100.0, "yarn", 4.0, 64, beta_fast=4.0),
]


@settings(max_examples=30)
@given(
    st.sampled_from(ROPES),
    st.lists(st.integers(0, 5000), min_size=2, max_size=5),
    st.integers(0, 5000),
)
def test_rotation(rope, places, shift):
    """Rotation keeps norms and position 0. Scores depend on distances only. Positions are data: any
    order, any restart."""
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
    table = rope_tables(RopeConfig(), torch.tensor([4095]), 4, torch.bfloat16)
    close(table[0, 0].item(), math.cos(4095), 1e-4)
    assert rotate(normal(1, 1, 4).bfloat16(), table).dtype == torch.bfloat16


def test_rotary_frequencies():
    """The plain frequencies. Llama 3's, by wavelength against the original context. The ends of
    YaRN's."""
    plain = 1e4 ** -(torch.arange(0, 128, 2, dtype=F64) / 128)
    close(frequencies(RopeConfig(), 128, F64), (plain, 1.0), 1e-14)
    wave = 2 * math.pi / plain
    smooth = ((8192 / wave - 1) / (4 - 1)).clamp(
        0, 1
    )  # 1: shorter than a 4th of the context; 0: longer
    close(
        frequencies(RopeConfig(scaling="llama3"), 128, F64),
        ((1 - smooth) * plain / 8 + smooth * plain, 1.0),
        1e-14,
    )
    yarn, scale = frequencies(RopeConfig(scaling="yarn"), 128, F64)
    ratio, short, long = yarn / plain, 8192 / wave >= 32, 8192 / wave <= 1
    close(
        (ratio[short].min().item(), ratio[long].max().item(), scale),
        (1.0, 1 / 8, 0.1 * math.log(8) + 1),
    )
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
        RopeConfig(**{name: bad})


def test_linear():
    x, w, b, y, v = (
        normal(5, 6),
        normal(6, 2, 3, 4),
        normal(2, 3, 4),
        normal(5, 2, 3),
        normal(2, 3, 7),
    )
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
    want = one_hot(tokens, 7) @ p.w_tokens + (
        one_hot(positions, 5) @ p.w_positions if learned else 0
    )
    same(embedding(p, tokens, positions, ONE), want, flat(p))


def test_a_batch_shifts_by_one():
    rows = torch.tensor([[5, 6, 7, 8], [9, IGNORE, 2, IGNORE]])
    batch = make_batch(rows, ONE, documents_BS=torch.tensor([[0, 0, 1], [0, 0, 0]]))
    assert batch.tokens_T.tolist() == [5, 6, 7, 9, 0, 2]  # an ignored input is some token
    assert batch.targets_T.tolist() == [6, 7, 8, IGNORE, 2, IGNORE]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1, 2]
    assert batch.documents_T.tolist() == [0, 0, 1, 0, 0, 0]
    assert batch.seq_len == 3 and make_batch(rows, ONE).documents_T is None


@pytest.mark.parametrize("z", [0.0, 0.1])
@pytest.mark.parametrize(("chunk", "cap"), [(1, None), (3, 2.0), (10, None), (1024, 0.7)])
def test_cross_entropy(chunk, cap, z):
    """The last rows of the head are padding. They are large, so that any use of them shows."""
    x, w = (
        normal(10, 6),
        torch.cat([normal(7, 6, seed=1), 50 * normal(3, 6)]).detach().requires_grad_(),
    )
    targets = torch.tensor([0, 6, IGNORE, 3, 3, IGNORE, 1, 2, 5, IGNORE])

    def loss(x: Tensor, w: Tensor) -> Tensor:
        entropy, z_loss = cross_entropy(x, w, targets, Loss(7, chunk, z, cap), ONE)
        assert not z_loss.requires_grad  # the first one's gradient includes it
        return entropy + z * z_loss

    scores = x @ w[:7].T
    scores = scores if cap is None else cap * (scores / cap).tanh()
    entropy = F.cross_entropy(scores, targets, reduction="sum", ignore_index=-100)
    want = entropy + z * (scores.logsumexp(-1).square() * (targets != -100)).sum()
    same(loss(x, w), want, [x, w])
    close(cross_entropy(x, w, targets, Loss(7, chunk, z, cap), ONE)[0], entropy)
    close(logits(x, w, 7, ONE, cap), scores)
    (slope,) = torch.autograd.grad(loss(x, w), w)
    assert (slope[7:] == 0).all() and (slope[:7] != 0).all()
    assert torch.autograd.gradcheck(loss, (x, w))
    with torch.no_grad():
        close(loss(x, w), want)


def test_ignored_targets_cost_nothing():
    x, w = normal(4, 6), normal(8, 6)
    loss, z_loss = cross_entropy(x, w, torch.full((4,), IGNORE), Loss(7, 3, 0.1), ONE)
    assert loss == z_loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, [x, w]))


def test_the_loss_of_bfloat16_is_float32():
    x, w, targets = normal(64, 32).bfloat16(), normal(100, 32).bfloat16(), torch.arange(64)
    want = F.cross_entropy((x @ w.T).float(), targets, reduction="sum")  # the dtypes must agree too
    close(cross_entropy(x, w, targets, Loss(100), ONE)[0], want, 1e-5)
