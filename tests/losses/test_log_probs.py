"""Log-probabilities of tokens: those of a plain softmax, on every mesh, and those of generation."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import simulated
from dtron.generation.cached_model import CachedModel
from dtron.generation.forward_inputs import ForwardInputs
from dtron.generation.scheduler import CacheSize
from dtron.layers import token_log_probs as layer
from dtron.layers.cross_entropy import IGNORE, Loss
from dtron.layers.token_log_probs import token_log_probs
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.transformer import predict
from dtron.params import init, unshard
from dtron.rules import rules_for
from dtron.runtime.config import DataConfig, RunConfig
from dtron.testing import assert_caught
from dtron.training.log_probs import log_probs
from dtron.training.pipeline import pipeline
from tests.helpers.runs import MODEL

ONE = Layout()
ROWS = torch.randint(61, (4, 17), generator=torch.Generator().manual_seed(1))
COUNTED = torch.rand(4, 16, generator=torch.Generator().manual_seed(2)) < 0.6


def found(mesh: str):
    """The log-probabilities of two microbatches."""
    shape = MeshShape.parse(mesh)
    with simulated(shape) as devices:
        layout = Layout(devices, rules_for(1))
        config = RunConfig(mesh=mesh, model=MODEL, data=DataConfig(seq_len=16))
        pipe = pipeline(config, shape, 2, 16, layout)
        weights = init(pipe.spec, MODEL.dims(), 0, layout, torch.float64)
        pairs = zip(ROWS.chunk(2), COUNTED.chunk(2), strict=True)
        batches = [make_batch(r, layout, counted_BS=c) for r, c in pairs]
        parts = log_probs(unshard(weights, layout), batches, MODEL, pipe)
        return tuple(torch.cat(xs) for xs in zip(*parts, strict=True))


def wanted():
    config = RunConfig(model=MODEL, data=DataConfig(seq_len=16))
    spec = pipeline(config, MeshShape(), 1, 16, ONE).spec
    (weights,) = init(spec, MODEL.dims(), 0, ONE, torch.float64)
    scores = predict(weights, make_batch(ROWS, ONE), MODEL, ONE).view(4, 16, -1)
    tokens = scores.log_softmax(-1).gather(-1, ROWS[:, 1:, None])[..., 0] * COUNTED
    return tokens, tokens.sum(1), COUNTED.sum(1)


@pytest.mark.parametrize("mesh", ["", "dp=2,tp=2", "cp=2,tp=2", "pp=2,cp=2"])
def test_they_are_those_of_a_softmax_on_any_mesh(mesh):
    for got, want in zip(found(mesh), wanted(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_softmax_over_a_shard_of_the_words_is_caught():
    with mock.patch.object(layer, "log_sum_exp", lambda x, layout: x.logsumexp(-1)):
        assert_caught(lambda: test_they_are_those_of_a_softmax_on_any_mesh("dp=2,tp=2"))


@pytest.mark.parametrize(("chunk", "cap"), [(None, None), (3, None), (2, 1.5)])
def test_gradients_are_those_of_a_softmax(chunk, cap):
    """Each log-probability has a gradient of its own, as in losses of whole sequences."""
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 4, generator=g, dtype=torch.float64) for n in (7, 11))
    targets = torch.tensor([3, IGNORE, 0, 9, 9, 1, IGNORE])

    def plain(x, w):
        scores = (x @ w.T)[:, :10]  # one row is padding
        scores = scores if cap is None else cap * (scores / cap).tanh()
        own = scores.log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
        return own * (targets != IGNORE)

    def ours(x, w):
        return token_log_probs(x, w, targets, Loss(10, chunk, softcap=cap), ONE)

    results = []
    for fn in (plain, ours):
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        y = fn(*leaves)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaves)))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", ["A", "L"])
def test_generation_gives_the_same(pattern):
    """Token by token from a cache, or all at once as in training: a trainer of reinforcement
    learning compares the two."""
    m = replace(MODEL, pattern=pattern)
    config = RunConfig(model=m, data=DataConfig(seq_len=16))
    pipe = pipeline(config, MeshShape(), 1, 16, ONE)
    weights = init(pipe.spec, m.dims(), 0, ONE, torch.float64)
    decoder = CachedModel(weights, m, pipe, CacheSize(rows=4, pages=5, page=16), "cpu")
    pages = torch.arange(1, 5)[:, None]  # page 0 is for padding; a text has a page
    steps = []
    for i in range(16):
        place, all_count = torch.full((4, 1), i), torch.ones(4, 1, dtype=torch.bool)
        tokens, last = ROWS[:, i : i + 2], torch.zeros(4, dtype=torch.long)
        scores = decoder(ForwardInputs(tokens, place, all_count, 16 * pages + place, last, pages))
        steps.append(scores.log_softmax(-1).gather(1, ROWS[:, i + 1, None])[:, 0])
    (got,) = log_probs(weights, [make_batch(ROWS, ONE)], m, pipe)
    torch.testing.assert_close(torch.stack(steps, 1).double(), got.tokens_BS, rtol=0, atol=1e-5)
