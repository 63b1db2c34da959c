"""Distillation: equal to its definition in plain torch, and on every mesh to one device."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from dtron.errors import UserError
from dtron.layers import divergence
from dtron.layers.cross_entropy import IGNORE, Loss
from dtron.layers.divergence import Divergence, distillation_loss, largest_logits
from dtron.losses.config import LossConfig
from dtron.mesh import Layout
from dtron.model.mtp import MTPConfig
from dtron.runtime.config import PipelineConfig
from dtron.testing import assert_caught
from tests.losses.runs import ONE, SMALL, assert_equal_on, assert_equal_to, own_log_probs, run_of

FORWARD = LossConfig(name="distillation", temperature=2.0, weight=0.7)
REVERSE = LossConfig(name="distillation", temperature=0.5, weight=0.6, reverse=True)
TOP = LossConfig(name="distillation", weight=0.9, top_k=3)
ALONE = LossConfig(name="distillation", weight=1.0)


def by_definition(config: LossConfig):
    """Hinton et al. 2015, word by word, over the whole vocabulary."""

    def plain(scores, other, batch):
        counts, t = batch.targets_T != IGNORE, config.temperature
        if config.top_k:
            least = other.topk(config.top_k).values[:, -1:]
            other = other.masked_fill(other < least, float("-inf"))
        q, p = (scores / t).softmax(-1), (other / t).softmax(-1)
        first, second = (q, p) if config.reverse else (p, q)
        terms = torch.where(first > 0, first * (first.clamp(min=1e-300) / second).log(), 0)
        kl = (terms.sum(-1) * counts).sum()
        entropy = -own_log_probs(scores, batch).sum()
        total = (1 - config.weight) * entropy + config.weight * t**2 * kl
        return total, int(counts.sum())

    return plain


@pytest.mark.parametrize("loss", [FORWARD, REVERSE, TOP, ALONE])
def test_loss_and_gradients_are_those_of_the_definition(loss):
    assert_equal_to(by_definition(loss), run_of(loss))


def test_soft_caps_of_both_models_count():
    capped = replace(SMALL, final_softcap=0.7)
    assert_equal_to(by_definition(REVERSE), run_of(REVERSE, model=capped))


@pytest.mark.parametrize(
    ("mesh", "loss", "choices"),
    [
        ("cp=2,tp=2", FORWARD, dict(zero=3)),
        ("pp=2,dp=2", REVERSE, dict(zero=2, pipeline=PipelineConfig("zb-h1"))),
        ("dp=2,tp=2", TOP, {}),
        ("dp=2,cp=2", FORWARD, dict(model=replace(SMALL, mtp=MTPConfig(1)))),
    ],
)
def test_a_step_is_the_same_on_every_mesh(mesh, loss, choices):
    assert_equal_on(mesh, loss, **choices)


def test_more_words_than_a_rank_has_are_refused():
    many = replace(TOP, top_k=15).objective
    many.check(Loss(29), 29, 1)
    with pytest.raises(UserError, match="--loss.top-k 15: a rank of tp=2 has 14 words; use"):
        many.check(Loss(29), 29, 2)
    with pytest.raises(UserError, match="has 14 words"):  # the others are padding
        many.check(Loss(14), 128, 1)


def test_the_largest_logits_are_those_of_the_whole_vocabulary():
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 4, generator=g) for n in (7, 12))
    values, words = largest_logits(x, w, 5, Loss(10, chunk=3), ONE)
    torch.testing.assert_close(values, (x @ w.T)[:, :10].topk(5).values)
    assert torch.equal(words, (x @ w.T)[:, :10].topk(5).indices)


def test_words_with_the_same_logits_have_no_divergence():
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 4, generator=g, dtype=torch.float64) for n in (7, 12))
    targets = torch.arange(7)
    rule = Divergence(2.0, 1.0, False)
    loss, entropy, kl = distillation_loss(x, w, targets, (x, w), rule, Loss(10, 3), ONE)
    assert loss.abs() < 1e-12 and kl.abs() < 1e-12 and entropy > 1


# ---------------------------------------------------------------------------- mutants


class NoSumOverWords(Layout):
    def all_reduce(self, x, axis, op="sum"):
        return x if (axis, op) == ("vocab", "sum") else super().all_reduce(x, axis, op)


def test_a_missing_sum_over_the_words_is_caught():
    def mutate(layout: Layout) -> Layout:
        return NoSumOverWords(layout.mesh, layout.rules, layout.compute, layout.reduce)

    assert_caught(lambda: assert_equal_on("tp=2", REVERSE, mutate))


def test_a_softmax_over_a_ranks_own_words_is_caught():
    own = lambda x, layout: x.log_softmax(-1)
    with mock.patch.object(divergence, "_log_softmax", own):
        assert_caught(lambda: assert_equal_on("tp=2", FORWARD))


@pytest.mark.parametrize(
    "change",
    [
        lambda rule: replace(rule, temperature=1.0),
        lambda rule: replace(rule, weight=1 - rule.weight),
        lambda rule: replace(rule, reverse=not rule.reverse),
    ],
)
def test_a_wrong_rule_is_caught(change):
    loss = divergence.distillation_loss
    spoiled = lambda x, w, t, teacher, rule, *rest: loss(x, w, t, teacher, change(rule), *rest)
    with mock.patch("dtron.losses.distillation.distillation_loss", spoiled):
        assert_caught(lambda: assert_equal_to(by_definition(FORWARD), run_of(FORWARD)))
