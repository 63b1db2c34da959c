"""DPO, IPO and SimPO: equal to trl's formulas in plain torch, and on every mesh to one device."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.nn.functional import logsigmoid

from dtron.layers.cross_entropy import IGNORE
from dtron.losses import sequence_sums
from dtron.losses.config import LOSSES, LossConfig
from dtron.losses.preference import Preference
from dtron.mesh import Layout
from dtron.model import batch as batches
from dtron.model.lora import LoraConfig
from dtron.moe.config import MoEConfig
from dtron.runtime.config import PipelineConfig
from dtron.testing import assert_caught
from dtron.training import reference
from tests.losses.runs import SMALL, assert_equal_on, assert_equal_to, own_log_probs, run_of
from tests.losses.toy_losses import Hinge

DPO = LossConfig(name="dpo", beta=0.3)
NORMALIZED = LossConfig(name="dpo", length_normalized=True, beta=2.0)
IPO = LossConfig(name="ipo", beta=0.5)
TRL_IPO = LossConfig(name="ipo", length_normalized=True)
SIMPO = LossConfig(name="simpo", beta=2.0, margin=0.5)


def pairs_of(batch):
    """The places of each answer of each pair, found by a loop: documents 2k and 2k + 1 of a row,
    if both have a target that counts."""
    rows, counts = batch.targets_T.view(-1, batch.seq_len), None
    documents = batch.documents_T.view(rows.shape)
    found = []
    for row in range(len(rows)):
        for k in range(0, int(documents[row].max()) + 1, 2):
            places = [
                (row * batch.seq_len + (documents[row] == d).nonzero()[:, 0]) for d in (k, k + 1)
            ]
            counts = [(batch.targets_T[at] != IGNORE).sum() for at in places]
            if all(counts):
                found.append((*places, *counts))
    return found


def by_trl(config: LossConfig):
    """The formulas of trl's DPOTrainer and CPOTrainer, pair by pair."""

    def plain(scores, other, batch):
        ours, theirs = (own_log_probs(x, batch) for x in (scores, other))
        losses = []
        for chosen, rejected, n_chosen, n_rejected in pairs_of(batch):
            logps = ours[chosen].sum(), ours[rejected].sum()
            refs = theirs[chosen].sum(), theirs[rejected].sum()
            if config.length_normalized or config.name == "simpo":
                logps = logps[0] / n_chosen, logps[1] / n_rejected
                refs = refs[0] / n_chosen, refs[1] / n_rejected
            logits = (logps[0] - logps[1]) - (refs[0] - refs[1])
            if config.name == "dpo":
                losses.append(-logsigmoid(config.beta * logits))
            elif config.name == "ipo":
                losses.append((logits - 1 / (2 * config.beta)) ** 2)
            else:
                logits = logps[0] - logps[1] - config.margin / config.beta
                losses.append(-logsigmoid(config.beta * logits))
        return torch.stack(losses).sum(), len(losses)

    return plain


@pytest.mark.parametrize("loss", [DPO, NORMALIZED, IPO, TRL_IPO, SIMPO])
def test_loss_and_gradients_are_those_of_trl(loss):
    assert_equal_to(by_trl(loss), run_of(loss))


MESHES = [
    ("dp=2,cp=2", DPO, dict(zero=2, recompute="full")),
    ("cp=2,tp=2", NORMALIZED, dict(zero=3)),
    ("pp=2,dp=2", IPO, dict(zero=3, pipeline=PipelineConfig("zb-h1"))),
    ("pp=2,tp=2", DPO, dict(lora=LoraConfig(rank=2, dora=True))),
    ("dp=2,tp=2", DPO, dict(zero=3, lora=LoraConfig(rank=2))),
    ("dp_replicate=2,cp=2", SIMPO, {}),
]


@pytest.mark.parametrize(("mesh", "loss", "choices"), MESHES)
def test_a_step_is_the_same_on_every_mesh(mesh, loss, choices):
    assert_equal_on(mesh, loss, **choices)


def test_a_step_with_experts_is_the_same():
    moe = MoEConfig(experts=4, top_k=2, mlp=8, bias=True)
    assert_equal_on("dp=2,ep=2", DPO, model=replace(SMALL, moe=moe))


def test_the_reference_of_lora_is_the_model_without_updates():
    assert_equal_to(by_trl(DPO), run_of(DPO, lora=LoraConfig(rank=2)))


def test_a_new_loss_of_pairs_is_one_function():
    def plain(scores, other, batch):
        ours, theirs = (own_log_probs(x, batch) for x in (scores, other))
        s = ours - theirs
        pairs = pairs_of(batch)
        terms = [(1 - 0.3 * (s[c].sum() - s[r].sum())).clamp(min=0) for c, r, *_ in pairs]
        return torch.stack(terms).sum(), len(pairs)

    with mock.patch.dict(LOSSES, hinge=Hinge):
        hinge = LossConfig(name="hinge", beta=0.3)
        assert_equal_to(plain, run_of(hinge))
        assert_equal_on("cp=2,tp=2", hinge)


# ---------------------------------------------------------------------------- mutants


class NoSumOverCP(Layout):
    def all_reduce(self, x, axis, op="sum"):
        return x if axis == "sequence" else super().all_reduce(x, axis, op)


def without_cp(layout: Layout) -> Layout:
    return NoSumOverCP(layout.mesh, layout.rules, layout.compute, layout.reduce)


def test_a_missing_sum_over_cp_is_caught():
    assert_caught(lambda: assert_equal_on("cp=2,tp=2", DPO, without_cp))


def test_a_gradient_divided_by_cp_is_caught():
    whole = lambda x, layout: x / layout.parts("sequence")
    with mock.patch("dtron.losses.preference.summand", whole):
        assert_caught(lambda: assert_equal_on("dp=2,cp=2", DPO))


def test_a_pair_that_is_split_over_two_rows_is_caught():
    """With an odd number of slots, a pair of every second row is split, and on some mesh it is on
    two ranks."""
    odd = lambda seq_len: seq_len + 1
    with (
        mock.patch.object(sequence_sums, "slots_per_row", odd),
        mock.patch.object(batches, "slots_per_row", odd),
    ):
        assert_caught(lambda: assert_equal_to(by_trl(DPO), run_of(DPO)))


def test_slots_by_the_rows_of_all_ranks_are_caught():
    every = lambda documents_BS, rows: sequence_sums.slots_of(documents_BS * 0, rows)
    with mock.patch.object(batches, "slots_of", every):
        assert_caught(lambda: assert_equal_to(by_trl(DPO), run_of(DPO)))


def spoiled_totals(change):
    totals = Preference._totals
    return mock.patch.object(Preference, "_totals", lambda self, *xs: totals(self, *change(*xs)))


def test_a_reference_that_is_not_detached_is_caught():
    """The model itself as its reference has no gradient, if it is not detached."""
    config = run_of(DPO)

    def plain(scores, other, batch):
        return by_trl(DPO)(scores, scores.detach(), batch)

    with spoiled_totals(lambda log_probs, counts, _: (log_probs, counts, log_probs.detach())):
        assert_equal_to(plain, config)
    with spoiled_totals(lambda log_probs, counts, _: (log_probs, counts, log_probs)):
        assert_caught(lambda: assert_equal_to(plain, config))


def test_a_length_with_the_padding_is_caught():
    with spoiled_totals(lambda log_probs, counts, ref: (log_probs, counts * 0 + 16, ref)):
        assert_caught(lambda: assert_equal_to(by_trl(NORMALIZED), run_of(NORMALIZED)))


def test_chosen_and_rejected_swapped_are_caught():
    with spoiled_totals(lambda *xs: [x.view(-1, 2).flip(1).flatten() for x in xs]):
        assert_caught(lambda: assert_equal_to(by_trl(DPO), run_of(DPO)))


def test_a_reference_with_updates_is_caught():
    with mock.patch.object(reference, "without_updates", lambda weights: weights):
        assert_caught(test_the_reference_of_lora_is_the_model_without_updates)
