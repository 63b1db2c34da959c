"""Attention kernels against the definition, and which token influences which token."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dtron.layers import attention_kernels
from dtron.layers.attention_kernels import (
    CORES,
    attention_reference,
    attention_sdpa,
    choose,
    with_blocks,
    with_sinks,
)
from dtron.layers.attention_mask import AttentionMask
from dtron.testing import assert_caught
from dtron.training.compiled_units import CompiledUnits
from dtron.training.traced_function import GraphCompiler
from tests.helpers.examples import examples
from tests.helpers.values import F64, close, flex_on_cpu, normal, same

PATHS = ("reference", "sdpa", "flex")
DOCUMENTS = torch.tensor([[2, 2, 2, 0, 0, 0], [0, 1, 1, 1, 1, 0]])


@pytest.fixture(autouse=True, scope="module")
def _flex():
    with flex_on_cpu():
        yield


@settings(max_examples=examples(30, thorough=600))
@given(
    path=st.sampled_from(["sdpa", "flex"]),
    b=st.integers(1, 3),
    kv=st.integers(1, 3),
    group=st.integers(1, 3),
    h=st.sampled_from([4, 6]),
    s=st.integers(1, 9) | st.sampled_from([128, 150]),
    window=st.none() | st.integers(1, 10),
    chunked=st.booleans(),
    packed=st.booleans(),
    softcap=st.sampled_from([None, 0.5]),
    sinks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_path_is_the_reference(
    path, b, kv, group, h, s, window, chunked, packed, softcap, sinks, seed
):
    assume(path == "flex" or not (softcap or sinks))
    q, k, v = (normal(b, n, s, h, seed=seed + 100 * i) for i, n in enumerate((kv * group, kv, kv)))
    documents = (normal(b, s, seed=seed) > 0.5).cumsum(-1) if packed else None
    sink = normal(kv * group, seed=seed + 300) if sinks else None
    got, want = (
        f(q, k, v, documents, sink, AttentionMask(s, window, softcap, chunked=chunked))
        for f in (CORES[path], attention_reference)
    )
    same(got, want, [q, k, v, *([sink] if sinks else [])])


@settings(max_examples=20)
@given(
    path=st.sampled_from(["sdpa", "flex"]),
    w=st.sampled_from([2, 4, 7]),
    scale=st.sampled_from([None, 0.9]),
    s=st.integers(1, 9),
    window=st.none() | st.integers(1, 10),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_values_of_another_width_and_another_scale(path, w, scale, s, window, packed, seed):
    """The reference is the same with values padded to the width of keys."""
    q, k, v = (
        normal(2, n, s, h, seed=seed + 100 * i) for i, (n, h) in enumerate(((4, 4), (2, 4), (2, w)))
    )
    documents = (normal(2, s, seed=seed) > 0.5).cumsum(-1) if packed else None

    def run(path, v, scale):
        return CORES[path](q, k, v, documents, None, AttentionMask(s, window, scale=scale))

    want = run("reference", v, scale)
    same(run(path, v, scale), want, [q, k, v])
    if w < 4:
        close(run("reference", F.pad(v, (0, 4 - w)), scale)[..., :w], want)
    if s > 1 and window is None and not packed:
        assert_caught(lambda: close(run(path, v, 0.4), want))


WRONG = {
    "window": {"mask": AttentionMask(6, 4, 0.5)},
    "documents": {"documents": None},
    "softcap": {"mask": AttentionMask(6, 3, 0.51)},
    "sinks": {"sinks": None},
    "shared keys": {"shuffled": True},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("what", WRONG)
def test_a_core_that_is_a_little_wrong_is_noticed(path, what):
    """The comparison above can fail: a window wider by one, ignored documents or sinks, exchanged
    heads."""
    hard = path != "sdpa"
    if not hard and what in ("softcap", "sinks"):
        pytest.skip("sdpa has neither")
    q, k, v = (normal(2, n, 6, 4, seed=i) for i, n in enumerate((4, 2, 2)))
    right = {
        "documents": DOCUMENTS,
        "sinks": normal(4, seed=3) if hard else None,
        "mask": AttentionMask(6, 3),
    }
    right["mask"] = AttentionMask(6, 3, 0.5 if hard else None)

    def run(core, documents, sinks, mask, shuffled=False):
        mask = mask if hard else replace(mask, softcap=None)
        pick = torch.tensor([1, 0]) if shuffled else torch.arange(2)
        return core(q, k[:, pick], v[:, pick], documents, sinks, mask)

    def check(**change):
        return same(run(CORES[path], **right | change), run(attention_reference, **right), [q])

    check()
    assert_caught(lambda: check(**WRONG[what]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_a_token_has_influence_where_it_may_be_seen_and_nowhere_else(path, documents, window):
    q, k, v = (normal(2, 2, 6, 4, seed=i) for i in range(3))
    run = lambda k, v: CORES[path](q, k, v, documents, None, AttentionMask(6, window)).sum((1, 3))
    k_slope, v_slope = torch.autograd.functional.jacobian(run, (k, v))
    for x, i, y, j in product(range(2), range(6), range(2), range(6)):
        seen = x == y and j <= i and (window is None or i - j < window)
        seen = seen and (documents is None or documents[x, i] == documents[x, j])
        assert (v_slope[x, i, y, :, j] != 0).all() if seen else (v_slope[x, i, y, :, j] == 0).all()
        assert seen or (k_slope[x, i, y, :, j] == 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_documents_never_meet(path):
    """When all of one document changes, outputs and gradients of the other document keep their
    bits. So they do with other document numbers."""
    hard, s, cut = path != "sdpa", 150, 70
    mask = AttentionMask(s, 40, 2.0 if hard else None)
    sinks = normal(4, seed=3) if hard else None
    documents = (torch.arange(s) >= cut).long().repeat(2, 1)

    def run(of_first: int, of_second: int, documents: Tensor) -> tuple[Tensor, ...]:
        def draw(n, i):
            return torch.cat(
                [
                    normal(2, n, cut, 8, seed=of_first + i),
                    normal(2, n, s - cut, 8, seed=of_second + i),
                ],
                dim=2,
            )

        xs = [draw(n, i).detach().requires_grad_() for i, n in enumerate((4, 2, 2))]
        y = CORES[path](*xs, documents, sinks, mask)
        return y, *torch.autograd.grad(y, xs, draw(4, 9).detach())

    for one, first, second in zip(
        run(0, 10, documents), run(0, 20, documents * 7 + 3), run(30, 10, documents), strict=True
    ):
        assert one[:, :, :cut].equal(first[:, :, :cut]) and not one[:, :, cut:].equal(
            first[:, :, cut:]
        )
        assert one[:, :, cut:].equal(second[:, :, cut:]) and not one[:, :, :cut].equal(
            second[:, :, :cut]
        )


def test_softcap():
    """With the identity as values, the output is the probabilities. Two of a row differ by a factor
    of at most e^(2 cap)."""
    q, k, eye = (
        30 * normal(1, 1, 8, 8),
        30 * normal(1, 1, 8, 8, seed=1),
        torch.eye(8, dtype=F64)[None, None],
    )
    p = attention_reference(q, k, eye, None, None, AttentionMask(8, softcap=1.5))[0, 0]
    odds = (1.5 * torch.tanh(q[0, 0] @ k[0, 0].T / math.sqrt(8) / 1.5)).exp().tril()
    close(p, odds / odds.sum(-1, keepdim=True))
    assert all(
        row[: i + 1].max() / row[: i + 1].min() <= math.exp(3.0) + 1e-9 for i, row in enumerate(p)
    )


def test_sinks():
    """The weights of a head sum to less than 1, by the share of its sink. A large sink takes
    everything, and a sink of -inf takes nothing."""
    q, k, eye = (
        normal(1, 3, 8, 8),
        normal(1, 3, 8, 8, seed=1),
        torch.eye(8, dtype=F64).expand(1, 3, 8, 8),
    )
    sinks = torch.tensor([1.0, 50.0, -math.inf], dtype=F64)
    p = attention_reference(q, k, eye, None, sinks, AttentionMask(8))[0]
    odds = (q[0] @ k[0].mT / math.sqrt(8)).exp().tril()
    close(p, odds / (odds.sum(-1, keepdim=True) + sinks.exp()[:, None, None]))
    assert (p[0].sum(-1) < 1).all() and p[1].sum() < 1e-9
    close(p[2], attention_reference(q, k, eye, None, None, AttentionMask(8))[0, 2])


@pytest.mark.parametrize(
    ("sinks", "mask"), [(None, AttentionMask(4, softcap=1.5)), (torch.zeros(1), AttentionMask(4))]
)
def test_sdpa_refuses_what_it_has_not(sinks, mask):
    with pytest.raises(ValueError, match="sdpa has neither; use --attention-kernel auto"):
        attention_sdpa(*torch.zeros(3, 1, 1, 4, 4), None, sinks, mask)


@pytest.mark.parametrize(
    ("mask", "documents", "sinks", "gpu", "small", "cpu"),
    [
        (AttentionMask(8), False, False, "sdpa", "sdpa", "sdpa"),
        (AttentionMask(8, window=8), False, False, "sdpa", "sdpa", "sdpa"),  # hides nothing
        (AttentionMask(8, window=7), False, False, "flex", "sdpa", "sdpa"),
        (AttentionMask(8), True, False, "flex", "sdpa", "sdpa"),
        (AttentionMask(8, softcap=2.0), False, False, "flex", "reference", "reference"),
        (AttentionMask(8), False, True, "flex", "reference", "reference"),
        (AttentionMask(8, window=3), True, True, "flex", "reference", "reference"),
    ],
)
def test_auto(mask, documents, sinks, gpu, small, cpu):
    """The choice by device. flex's GPU kernels need a minimal head_dim and have no float64."""
    auto = partial(choose, "auto", mask, documents, sinks)
    cuda = torch.device("cuda")
    assert auto(80, torch.bfloat16, cuda) == auto(16, torch.float32, cuda) == gpu
    assert auto(8, torch.bfloat16, cuda) == auto(64, torch.float64, cuda) == small
    assert auto(64, torch.float32, torch.device("cpu")) == cpu
    for path in PATHS:
        assert choose(path, mask, documents, sinks, 64, torch.float32, cuda) == path


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_flex_compiled_by_itself_in_a_recomputed_region(documents):
    """The eager program does so on a GPU. Uncompiled, a recomputed flex has wrong gradients under a
    soft-cap: torch then differentiates the soft-cap while the region's hooks on saved tensors are
    active."""
    q, k, v = (normal(2, n, 6, 4, seed=i) for i, n in enumerate((4, 2, 2)))
    mask, sinks = AttentionMask(6, 3, 0.5), normal(4, seed=3)
    compiled = torch.compile(
        attention_kernels.run_flex, fullgraph=True, dynamic=False, backend="aot_eager"
    )
    attend = lambda q, k, v, sinks, mask: with_sinks(*compiled(q, k, v, mask), sinks)
    got = checkpoint(
        attend, q, k, v, sinks, with_blocks(mask, documents, q.device), use_reentrant=False
    )  # its log-sum-exp is float32
    want = attention_reference(q, k, v, documents, sinks, mask)
    close(got, want, 1e-6)
    for a, b in zip(
        *(torch.autograd.grad(y.square().sum(), [q, k, v, sinks]) for y in (got, want))
    ):
        close(a, b, 1e-5)


def _attend(heads: list[Tensor], mask: AttentionMask, documents: Tensor) -> tuple[Tensor]:
    return (attention_kernels.attention_flex(*heads, documents, None, mask),)


@pytest.mark.slow
@torch.no_grad()
def test_units_with_flex_have_any_number_of_shapes():
    """flex_attention compiles a part of itself. The second shape must not be symbolic there."""
    units = CompiledUnits(None, GraphCompiler("inductor"))
    for rows, s in ((1, 128), (2, 256)):
        heads = [torch.randn(rows, 2, s, 16) for _ in range(3)]
        documents = torch.arange(s).repeat(rows, 1) // 50
        mask = with_blocks(AttentionMask(s), documents, documents.device)
        (got,) = units(_attend, heads, mask, documents)
        want = attention_reference(*heads, documents, None, AttentionMask(s))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
