"""The largest attention logit of each head is that of a loop over all pairs of tokens."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtron.layers import attention_logits
from dtron.layers.attention_logits import largest_logits
from dtron.layers.attention_mask import AttentionMask
from dtron.testing import assert_caught
from tests.helpers.compiled import as_unit
from tests.helpers.examples import examples
from tests.helpers.values import F64, close, normal


def by_loops(q, k, documents, mask: AttentionMask) -> list[float]:
    """The definition, a pair at a time."""
    q, k, (rows, heads, queries, width) = q.detach(), k.detach(), q.shape
    scale = 1 / math.sqrt(width) if mask.scale is None else mask.scale
    found = [-math.inf] * heads
    for b in range(rows):
        for s in range(queries):
            i = s if mask.queries is None else int(mask.queries[b % len(mask.queries), s])
            for t in range(k.shape[2]):
                j = t if mask.keys is None else int(mask.keys[t])
                hidden = j > i
                if mask.window is not None:
                    w = mask.window
                    hidden |= i // w != j // w if mask.chunked else i - j >= w
                if hidden or (documents is not None and documents[b, i] != documents[b, j]):
                    continue
                for n in range(heads):
                    key = k[b, n * k.shape[1] // heads, t]
                    found[n] = max(found[n], scale * float(q[b, n, s] @ key))
    return found


@st.composite
def cases(draw):
    rows, length = draw(st.integers(1, 2)), draw(st.integers(1, 7))
    heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    seed, places = draw(st.integers(0, 99)), draw(st.booleans())
    g = torch.Generator().manual_seed(seed)
    queries = keys = None
    if places:  # a rank's queries, and all keys in another order; see context_parallel.py
        keys = torch.randperm(length, generator=g)
        queries = torch.randperm(length, generator=g)[: max(1, length // 2)][None]
    q = normal(rows, heads * group, length if queries is None else queries.shape[1], 4, seed=seed)
    k = normal(rows, heads, length, 4, seed=seed + 1)
    documents = torch.randint(2, (rows, length), generator=g) if draw(st.booleans()) else None
    window, scale = draw(st.sampled_from([None, 1, 3, 9])), draw(st.sampled_from([None, 0.3]))
    mask = AttentionMask(length, window, 2.0, scale, queries, keys, chunked=draw(st.booleans()))
    return q, k, documents, mask


def agrees(case, at_once: int) -> None:
    q, k, documents, mask = case
    with mock.patch.object(attention_logits, "LOGITS_AT_ONCE", at_once):
        got = largest_logits(q, k, documents, mask)
    assert not got.requires_grad
    close(got, torch.tensor(by_loops(q, k, documents, mask), dtype=q.dtype))


@settings(max_examples=examples(40))
@given(case=cases(), at_once=st.sampled_from([1, 12, 30, 1 << 27]))
def test_it_is_the_maximum_of_visible_pairs(case, at_once):
    agrees(case, at_once)


@pytest.mark.parametrize("at_once", [1, 1 << 27])
def test_hidden_pairs_are_caught(at_once):
    q, k = torch.zeros(2, 1, 1, 9, 4, dtype=F64)
    q[..., 8, 0] = k[..., 1, 0] = 5.0  # the largest pair is of two documents
    case = q, k, torch.arange(9)[None] // 4, AttentionMask(9)
    agrees(case, at_once)
    every = lambda mask, documents, b, i, j: (i == i) & (j == j)
    with mock.patch.object(attention_logits, "sees", every):
        assert_caught(lambda: agrees(case, at_once))


def test_a_compiler_sees_one_operator():
    q, k = (x.detach() for x in (normal(2, 4, 9, 4), normal(2, 2, 9, 4, seed=1)))
    documents = torch.arange(9).repeat(2, 1) // 4
    fn = lambda q, k, documents: largest_logits(q * 2, k, documents, AttentionMask(9, 3))
    close(as_unit(fn)(q, k, documents), fn(q, k, documents))


def test_bfloat16_is_rounded_once():
    q, k = (x.detach().bfloat16() for x in (normal(1, 2, 9, 4), normal(1, 2, 9, 4, seed=1)))
    got = largest_logits(q, k, None, AttentionMask(9))
    want = largest_logits(q.double(), k.double(), None, AttentionMask(9))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=0)
