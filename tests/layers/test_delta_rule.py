"""The gated delta rule: its chunked form is its definition, and transformers' definition."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from dtron.layers import delta_rule as module
from dtron.layers.delta_rule import DeltaTokens, delta_rule, delta_rule_by_token
from dtron.layers.state_passing import Maps, applied, states_before
from dtron.testing import assert_caught
from tests.helpers.examples import examples
from tests.helpers.values import close, normal, same
from tests.helpers.wide_transformers import in_float64

HEADS, KEY, VALUE, ROWS = 3, 5, 4, 2


def tokens(
    seq_len: int, seed: int = 0, starts: Tensor | None = None, channels: bool = False
) -> DeltaTokens:
    shapes = (KEY, KEY, VALUE)
    q, k, v = (normal(ROWS, seq_len, HEADS, n, seed=seed + i) for i, n in enumerate(shapes))
    log_decay = normal(ROWS, seq_len, HEADS, KEY if channels else 1, seed=seed + 3).detach()
    beta = normal(ROWS, seq_len, HEADS, seed=seed + 4).detach()
    q, k = (F.normalize(x, dim=-1).detach().requires_grad_() for x in (q, k))
    log_decay = (-2 * log_decay.abs()).requires_grad_()
    return DeltaTokens(q, k, v, log_decay, (2 * beta.sigmoid()).requires_grad_(), starts)


def both(x: DeltaTokens, state: Tensor | None, chunk: int) -> None:
    """The chunked form has the outputs, the last state and the gradients of the definition."""
    inputs = [*x[:5], *([] if state is None else [state])]
    want, got = delta_rule_by_token(x, state), delta_rule(x, state, chunk)
    same(*(torch.cat([y.flatten() for y in pair]) for pair in (got, want)), inputs)


CHOICES = dict(
    seq_len=st.integers(1, 30),
    chunk=st.integers(1, 12),
    documents=st.booleans(),
    state=st.booleans(),
    channels=st.booleans(),
    seed=st.integers(0, 99),
)


def one_case(seq_len, chunk, documents, state, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(ROWS, seq_len, generator=generator) < 0.2 if documents else None
    first = normal(ROWS, HEADS, KEY, VALUE, seed=seed) if state else None
    with mock.patch.object(module, "BLOCK", 4):
        both(tokens(seq_len, seed, starts, channels), first, chunk)


test_chunks_change_nothing = settings(max_examples=examples(15))(given(**CHOICES)(one_case))


def decays_twice(maps: Maps, *others) -> tuple[Tensor, Tensor]:
    """Mutant: a chunk's decay is applied to the state before the chunk too."""
    states, last = states_before(maps, *others)
    return applied(maps._replace(offset=torch.zeros_like(maps.offset)), states, states.dtype), last


def forgets_the_state(maps: Maps, *others) -> tuple[Tensor, Tensor]:
    states, last = states_before(maps, *others)
    return torch.zeros_like(states), last


@pytest.mark.parametrize("mutant", [decays_twice, forgets_the_state])
def test_mutants(mutant):
    with mock.patch.object(module, "states_before", mutant):
        assert_caught(lambda: one_case(20, 4, False, True, False, 0))


def test_a_document_start_that_is_ignored_is_noticed():
    starts = torch.zeros(ROWS, 20, dtype=torch.bool)
    starts[0, 9] = True
    x = tokens(20, starts=starts)
    want = delta_rule_by_token(x)
    assert_caught(lambda: close(delta_rule(x._replace(starts_BS=None), chunk=4), want))


@pytest.mark.parametrize("theirs", ["chunk", "recurrent"])
@pytest.mark.parametrize("ours", [delta_rule_by_token, delta_rule])
def test_the_rule_is_that_of_transformers(theirs, ours):
    x, state = tokens(21), normal(ROWS, HEADS, KEY, VALUE, seed=9)
    fn = getattr(qwen, f"torch_{theirs}_gated_delta_rule")
    with in_float64(qwen):
        o, last = fn(
            *x[:3], g=x.log_decay[..., 0], beta=x.beta, initial_state=state, output_final_state=True
        )
    got_o, got_last = ours(x._replace(q=x.q * KEY**-0.5), state)
    want = torch.cat([o.flatten(), last.flatten()])
    same(torch.cat([got_o.flatten(), got_last.flatten()]), want, [*x[:5], state])


@pytest.mark.parametrize("ours", [delta_rule_by_token, delta_rule])
def test_decays_of_channels_are_those_of_transformers(ours):
    x, state = tokens(37, channels=True), normal(ROWS, HEADS, KEY, VALUE, seed=9)
    with in_float64(kimi):
        o, last = kimi.recurrent_kimi_delta_attention(
            *x[:3], x.log_decay, x.beta, initial_state=state, output_final_state=True
        )
    got_o, got_last = ours(x._replace(q=x.q * KEY**-0.5), state)
    want = torch.cat([o.flatten(), last.flatten()])
    same(torch.cat([got_o.flatten(), got_last.flatten()]), want, [*x[:5], state])


@pytest.mark.parametrize("count", [1, 2, 5, 12, 17, 64])
@pytest.mark.parametrize(("decays", "changes"), [(1, False), (1, True), (KEY, True)])
def test_maps_are_combined_in_order(count, decays, changes):
    """States are those of applying the maps one by one. A transition may be a number."""
    decay, offset = normal(count, 2, decays, 1), normal(count, 2, KEY, VALUE, seed=1)
    change = normal(count, 2, KEY, KEY, seed=3) if changes else None
    first = normal(2, KEY, VALUE, seed=2)
    maps, state, want = Maps(decay, change, offset), first, []
    for a, b in zip(maps.transition, offset, strict=True):
        want.append(state)
        state = (a if changes else a * torch.eye(KEY)) @ state + b
    states, last = states_before(maps, first)
    inputs = [x for x in (*maps, first) if x is not None]
    same(torch.cat([states, last[None]]), torch.stack([*want, state]), inputs)


def test_a_state_that_decays_is_not_rounded():
    """However many chunks it passes. Only the product with the change is rounded."""
    state = torch.rand(4, 3, dtype=torch.float32)
    decay = torch.full((40, 1, 1), 0.97, dtype=torch.float32)
    maps = Maps(decay, torch.zeros(40, 4, 4, dtype=torch.float32), torch.zeros(40, 4, 3))
    _, last = states_before(maps.each(lambda x: x.float()), state, dtype=torch.bfloat16)
    torch.testing.assert_close(last, state * 0.97**40, rtol=1e-5, atol=0)
