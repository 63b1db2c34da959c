"""Multi-token prediction: the tokens that are predicted, and the stage that has the modules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dtron.layers.cross_entropy import IGNORE
from dtron.layers.mla import MLAConfig
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.mtp import MTPConfig, look_ahead
from dtron.model.stages import layers_per_stage, split_into_stages
from dtron.model.transformer import embed, forward, predict, stage
from dtron.params import init
from dtron.runtime.config import ModelConfig, RunConfig
from dtron.training.compiled_stage import compiled
from dtron.training.gradients import gradients
from dtron.training.pipeline import one_stage, program
from dtron.tree import flat

LATENT = MLAConfig(kv_rank=9, q_rank=11, nope_dim=6, rope_dim=4, v_dim=5)


ONE = Layout()


@given(
    rows=st.integers(1, 3),
    seq_len=st.integers(1, 9),
    depth=st.integers(1, 4),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_is_predicted_from_what(rows, seq_len, depth, packed, seed):
    """Against the definition, one position at a time."""
    g = torch.Generator().manual_seed(seed)
    row = torch.randint(1, 50, (rows, seq_len + 1), generator=g)
    row[:, 1:][torch.rand(rows, seq_len, generator=g) < 0.2] = IGNORE
    tokens, targets = row[:, :-1].clamp(min=0), row[:, 1:]
    documents = (torch.rand(rows, seq_len, generator=g) < 0.3).cumsum(1) if packed else None
    got_tokens, got_targets = look_ahead(tokens, targets, depth, documents)
    for b in range(rows):
        for i in range(seq_len):
            for k in range(1, depth + 1):
                token = row[b, i + k].clamp(min=0) if i + k <= seq_len else 0
                assert got_tokens[b, i, k - 1] == token
                there = i + k + 1 <= seq_len
                if there and packed:
                    there = documents[b, i] == documents[b, min(i + k + 1, seq_len - 1)]
                assert got_targets[b, i, k - 1] == (row[b, i + k + 1] if there else IGNORE)


SMALL = ModelConfig(
    vocab=29, embed=10, layers=2, heads=2, kv_heads=2, head_dim=4, mlp=8, vocab_multiple=1
)


def drawn(m: ModelConfig) -> tuple:
    return init(one_stage(m, 1, ONE).spec, m.dims(), 0, ONE, torch.float64)


def rows_of(seed: int = 0) -> Tensor:
    return torch.randint(29, (4, 13), generator=torch.Generator().manual_seed(seed))


def reported(
    m: ModelConfig, rows: Tensor, layout: Layout = ONE, documents=None
) -> tuple[float, Tensor]:
    """The main loss and the MTP losses of one step."""
    pipe = one_stage(m, 1, layout)
    params = init(pipe.spec, m.dims(), 0, layout, torch.float64)
    batches = [make_batch(rows, layout, documents, depth=m.mtp.depth)]
    loss, _, reports = gradients(program(m, layout), params, batches, 1, pipe, zero=1)
    return loss, reports[0]["mtp"]


@pytest.mark.parametrize("depth", [0, 1])
def test_a_token_changes_the_losses_of_its_own_future_alone(depth):
    """Module k predicts token i + k + 1 at position i, from tokens up to i + k. When a token
    changes, the last k + 1 of the positions before it notice."""
    m, changed = replace(SMALL, mtp=MTPConfig(2)), 5
    (params,), rows = drawn(m), rows_of()

    def losses(rows: Tensor) -> list[float]:
        """The loss of each position alone."""
        batch, found = make_batch(rows, ONE, depth=2), []
        for i in range(changed):
            targets = torch.full_like(batch.targets_TA, IGNORE)
            targets[i, depth] = batch.targets_TA[i, depth]
            one = replace(batch, targets_TA=targets)
            extra = stage(params, embed(params, one, m, ONE), one, m=m, layout=ONE)[1]
            found.append(extra.report["mtp"][depth].item())
        return found

    other = rows.clone()
    other[0, changed] = (rows[0, changed] + 1) % 29
    differ = [a != b for a, b in zip(losses(rows), losses(other), strict=True)]
    assert differ == [False] * (changed - depth - 2) + [True] * (depth + 2)


def test_the_main_loss_and_the_logits_are_those_without():
    m, rows = replace(SMALL, mtp=MTPConfig(2)), rows_of()
    (params,), batch = drawn(m), make_batch(rows, ONE)
    plain = replace(params, mtp=())
    assert torch.equal(predict(params, batch, m, ONE), predict(plain, batch, SMALL, ONE))
    loss, ahead = reported(m, rows)
    assert (
        torch.equal(loss, forward(plain, batch, SMALL, ONE))
        and (ahead > 0).all()
        and len(ahead) == 2
    )


def test_an_initial_model_predicts_nothing_ahead_either():
    """The loss of a module is a sum over its targets: log(vocab) each, for an untrained model."""
    rows = rows_of()
    rows[0, 8:] = IGNORE
    documents = torch.arange(12).expand(4, 12) // 5
    _, ahead = reported(replace(SMALL, mtp=MTPConfig(3)), rows, documents=documents)
    _, targets = look_ahead(rows[:, :-1].clamp(min=0), rows[:, 1:], 3, documents)
    counts = (targets != IGNORE).sum((0, 1))
    torch.testing.assert_close(
        ahead / counts, torch.full((3,), 29.0).log().double(), rtol=0.02, atol=0
    )


@pytest.mark.parametrize("recompute", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_compiled_gradients_are_those_of_eager(recompute):
    torch.compiler.reset()
    m, found = replace(SMALL, layers=1, mla=LATENT, mtp=MTPConfig(2, 0.7)), []
    how = replace(RunConfig().how, recompute=recompute)
    for compiles in (False, True):
        functions, pipe = program(m, ONE, how), one_stage(m, 2, ONE)
        functions = compiled(functions, ONE, backend="aot_eager") if compiles else functions
        batches = [make_batch(r, ONE, depth=2) for r in rows_of().chunk(2)]
        found.append(gradients(functions, drawn(m), batches, 1, pipe, 1))
    (want_loss, want, _), (got_loss, got, reports) = found
    torch.testing.assert_close(got_loss, want_loss, rtol=1e-12, atol=0)
    assert reports[0]["mtp"].shape == (2,)
    for a, b in zip(flat(got), flat(want), strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_last_stage_has_the_modules_and_a_twin():
    m = replace(SMALL, layers=4, mtp=MTPConfig(2))
    first, last = split_into_stages(m, [2, 2])
    assert not first.mtp and len(last.mtp) == 2 and first.embedding and first.w_head is None
    assert last.embedding.w_tokens.twin and last.embedding.w_positions is None
    assert sum(w.twin for s in (first, last) for w in flat(s)) == 1


def test_modules_count_as_the_blocks_and_heads_they_cost():
    m = replace(SMALL, layers=12, embed=64, vocab=50)
    plain, ahead = (layers_per_stage(replace(m, mtp=MTPConfig(n)), 2, 16) for n in (0, 4))
    assert sum(plain) == sum(ahead) == 12 and ahead[1] < plain[1]


def test_what_does_not_fit_is_one_line():
    for make in (
        lambda: MTPConfig(-1),
        lambda: MTPConfig(1, -0.1),
        lambda: MTPConfig(1, float("nan")),
    ):
        with pytest.raises(ValueError, match=r"model\.mtp .*at least 0") as error:
            make()
        assert "\n" not in str(error.value)
