"""Sampling follows its settings: against transformers, and against the definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dtron.generation.sampling import Sampling, draw_tokens, penalised, probabilities
from dtron.testing import assert_caught
from tests.helpers.texts import one_line

VOCAB = 11
F64 = torch.float64
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.floats(0.1, 3.0),
    top_p=st.just(1.0) | st.floats(0.05, 0.99),
    top_k=st.integers(0, VOCAB + 2),
    min_p=st.just(0.0) | st.floats(0.01, 0.9),
    repetition_penalty=st.just(1.0) | st.floats(0.3, 3.0),
)


def odds(logits_BV: Tensor, samplings: list[Sampling], texts: list[list[int]]) -> Tensor:
    """The probabilities of tokens in order."""
    p_BV, order_BV = probabilities(penalised(logits_BV, samplings, texts), samplings)
    if order_BV is not None:
        p_BV = torch.zeros_like(p_BV).scatter(1, order_BV, p_BV)
    return p_BV / p_BV.sum(-1, keepdim=True)


def odds_of_transformers(logits_V: Tensor, s: Sampling, text: list[int]) -> Tensor:
    from transformers.generation import logits_process as theirs

    steps = [
        theirs.RepetitionPenaltyLogitsProcessor(s.repetition_penalty),
        theirs.TemperatureLogitsWarper(s.temperature),
        *([theirs.TopKLogitsWarper(s.top_k)] if s.top_k else []),
        *([theirs.TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []),
        *([theirs.MinPLogitsWarper(s.min_p)] if s.min_p else []),
    ]
    ids, scores = torch.tensor([text]), logits_V[None]
    for step in steps:
        scores = step(ids, scores)
    return scores[0].softmax(-1)


def assert_transformers(rows: list[Sampling], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), VOCAB, generator=g, dtype=F64) * 2
    lengths = torch.randint(1, 6, (len(rows),), generator=g).tolist()
    texts = [torch.randint(VOCAB, (n,), generator=g).tolist() for n in lengths]
    got = odds(logits, rows, texts)
    for row, s, text, found in zip(logits, rows, texts, got, strict=True):
        torch.testing.assert_close(found, odds_of_transformers(row, s, text))


@given(st.lists(SAMPLINGS, min_size=1, max_size=4), st.integers(0, 10**6))
def test_the_odds_of_transformers(rows, seed):
    """Each row of a batch has its own settings."""
    assert_transformers(rows, seed)


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_k": 4},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"repetition_penalty": 1.5},
        {"temperature": 0.5},
    ],
)
def test_a_setting_that_is_left_out_is_caught(wrong, monkeypatch):
    there = odds_of_transformers
    monkeypatch.setitem(
        globals(), "odds_of_transformers", lambda v, s, t: there(v, replace(s, **wrong), t)
    )
    assert_caught(lambda: assert_transformers([Sampling(1.0)], 3))


def drawn(logits: Tensor, sampling: Sampling, g: torch.Generator) -> Tensor:
    uniform = torch.rand(len(logits), generator=g, dtype=F64)
    return draw_tokens(logits, [sampling] * len(logits), uniform)


@given(st.integers(0, 10**6), st.floats(0.05, 1.0), st.floats(0.1, 3.0))
def test_only_the_likeliest_are_drawn(seed, top_p, temperature):
    """The smallest set of tokens that has this probability."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(40, 9, generator=g) * 2
    tokens = drawn(logits, Sampling(temperature, top_p), g)
    for row, token in zip((logits / temperature).softmax(-1), tokens, strict=True):
        likelier = row[row > row[token]].sum()
        assert likelier < top_p + 1e-5


def test_draws_follow_the_odds():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(20_000, 3)
    g = torch.Generator().manual_seed(0)

    def share(**options) -> torch.Tensor:
        tokens = drawn(logits, Sampling(**options), g)
        return torch.bincount(tokens, minlength=3) / 20_000

    def same(found: Tensor, want: list[float]) -> None:
        torch.testing.assert_close(found, torch.tensor(want), atol=0.02, rtol=0)

    same(share(temperature=1.0), [0.5, 0.3, 0.2])
    same(share(temperature=1.0, top_p=0.6), [0.625, 0.375, 0.0])
    same(share(temperature=1.0, top_k=2), [0.625, 0.375, 0.0])
    same(share(temperature=1.0, min_p=0.5), [0.625, 0.375, 0.0])
    same(share(temperature=0.5), [25 / 38, 9 / 38, 4 / 38])
    assert share(temperature=0.0).tolist() == [1.0, 0.0, 0.0]


def test_the_ends_of_the_random_numbers():
    """0 draws the first token with any probability, and the number before 1 the last one."""
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=F64)
    logits = torch.tensor([[-float("inf"), 0.0, 1.0, -float("inf")]]).expand(2, 4)
    assert draw_tokens(logits, [Sampling(1.0)] * 2, ends).tolist() == [1, 2]


def test_extreme_settings_draw_as_their_limits_do():
    """A tiny temperature takes the most likely token, a large one draws from all alike."""
    logits = torch.tensor([[0.0, 3.0, 2.9, -80.0], [70.0, 1.0, -70.0, 69.9]])
    seeded = lambda: torch.Generator().manual_seed(0)
    for rows in (logits, logits.bfloat16().float()):
        tiny = [Sampling(t) for t in (1e-40, 5e-324, 1e-300, 1e-4)]
        for sampling in [*tiny, *(Sampling(1.0, p) for p in (5e-324, 1e-300, 1e-40))]:
            tokens = drawn(rows, sampling, seeded())  # in bfloat16 two tokens are equal
            assert rows.gather(1, tokens[:, None])[:, 0].tolist() == rows.amax(1).tolist()
    hot = drawn(logits[:1].expand(400, 4), Sampling(1.7e308), torch.Generator())
    assert (torch.bincount(hot, minlength=4) > 60).all()


def test_a_row_that_is_not_finite_is_minus_1_alone():
    logits = torch.tensor([[0.0, float("nan")], [1.0, 0.0], [0.0, float("inf")]])
    for temperature in (0.0, 1e-9):
        rows = [Sampling(temperature)] * 3
        assert draw_tokens(logits, rows, torch.zeros(3, dtype=F64)).tolist() == [-1, 0, -1]


def test_what_cannot_be_sampled():
    for bad in (2**64, -(2**63) - 1, 10**30):
        one_line(lambda bad=bad: Sampling(seed=bad), "--seed", "64 bits")
    for good in (2**64 - 1, -(2**63)):
        torch.Generator().manual_seed(Sampling(seed=good).seed)
    nan, inf = float("nan"), float("inf")
    for name, values in {
        "temperature": (-0.5, nan, inf),
        "top_p": (0.0, 1.5, nan),
        "top_k": (-1,),
        "min_p": (-0.1, 1.5, nan),
        "repetition_penalty": (0.0, -1.0, nan, inf),
    }.items():
        flag = f"--{name.replace('_', '-')}"
        for bad in values:
            one_line(lambda name=name, bad=bad: Sampling(**{name: bad}), flag, str(bad))
