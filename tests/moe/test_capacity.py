"""A capacity limit and padding: tokens on which no loss depends take no room from others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtron.layers.cross_entropy import IGNORE
from dtron.model.batch import make_batch
from dtron.moe import dispatch
from dtron.moe.permutation import TokenPermutation
from dtron.params import init
from dtron.testing import assert_caught
from dtron.training.gradients import gradients
from dtron.training.pipeline import one_stage, program
from dtron.training.reports import describe_experts, expert_totals
from dtron.tree import flat
from tests.helpers.experts import ONE
from tests.moe.test_moe_models import model_config

PROMPT, ANSWER = 3, 5


def step(seed: int, padding: int, factor: float, rows: int = 2) -> tuple[list[Tensor], dict]:
    """The loss and the gradients of rows with a prompt, an answer and padding, and the numbers of
    the expert layers."""
    limited = {"capacity_factor": factor, "aux_loss": 0.1, "z_loss": 0.05}
    m = replace(model_config("dp=1", each=4, **limited).model, context=96, init_std=0.3)
    g = torch.Generator().manual_seed(seed)
    row_BS = torch.randint(m.vocab, (rows, PROMPT + ANSWER + 1), generator=g)
    counted = torch.zeros(rows, PROMPT + ANSWER, dtype=torch.bool)
    counted[:, PROMPT:] = True
    counted, row_BS = F.pad(counted, (0, padding)), F.pad(row_BS, (0, padding), value=7)
    batch = make_batch(row_BS, ONE, counted_BS=counted, needed=True)
    pipe, functions = one_stage(m, 1, ONE), program(m, ONE, splits=False)
    params = init(pipe.spec, m.dims(), 0, ONE, torch.float64)
    loss, grads, reports = gradients(functions, params, [batch], rows * ANSWER, pipe, 1)
    return [loss, *flat(grads)], describe_experts(expert_totals(reports, pipe, m.moe), m)


def padding_changes_nothing(seed: int, padding: int, factor: float) -> None:
    (want, numbers), (got, padded) = (step(seed, n, factor) for n in (0, padding))
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert padded == pytest.approx(numbers)
    assert 0 <= numbers["experts.0.dropped"] < 1


@settings(max_examples=10)
@given(st.integers(0, 99), st.sampled_from([1, 7, 40]), st.sampled_from([0.5, 1.0, 1.25]))
def test_padding_changes_neither_loss_nor_load_nor_what_is_dropped(seed, padding, factor):
    """Known bug of other trainers, and once of this one: padding takes the room of real tokens. A
    prompt is no padding: the answer depends on it."""
    padding_changes_nothing(seed, padding, factor)


def test_something_is_dropped():
    assert step(0, 0, 0.5)[1]["experts.0.dropped"] > 0.2


MUTANTS: dict[str, Callable] = {
    "the limit grows with padding": lambda real: lambda e, w, n, room, limit: real(e, w, n, room),
    "padding is sent": lambda real: (
        lambda e, w, n, room, limit: real(e.where(e < n, 0), w, n, room, limit)
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_room_for_padding_is_caught(name):
    def examples() -> None:
        for seed in range(5):
            padding_changes_nothing(seed, 40, 0.5)

    examples()
    with mock.patch.object(dispatch, "by_room", MUTANTS[name](dispatch.by_room)):
        assert_caught(examples)


def test_what_is_needed():
    """A token with a target that counts at it or later in its row."""
    rows = torch.tensor([[1, 2, IGNORE, 4, IGNORE, IGNORE], [1, *[IGNORE] * 5]])
    batch = make_batch(rows, ONE, needed=True)
    assert batch.needed_T is not None and make_batch(rows, ONE).needed_T is None
    assert batch.needed_T.view(2, 5).tolist() == [[True] * 3 + [False] * 2, [False] * 5]


def test_a_slot_that_is_not_sent_has_no_row():
    expert_S = torch.tensor([2, 0, 1, 2, 0])  # 2 of 2 experts: not sent
    plan: TokenPermutation = dispatch.by_room(expert_S, torch.rand(5), 2, 3)
    assert plan.kept_S is not None and plan.filled_R is not None
    assert plan.kept_S.tolist() == [False, True, True, False, True]
    assert plan.filled_R.tolist() == [True, True, False, True, False, False]
