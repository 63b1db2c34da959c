"""The gradients of every family are the gradients of transformers, weight by weight."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dtron.hf import Source
from dtron.hf.load import rotary_columns, weights_of
from dtron.hf.tensor_pattern import pairs, pattern
from dtron.model.batch import make_batch
from dtron.model.config import ModelConfig
from dtron.model.transformer import declare_model, forward
from dtron.tree import flat, tree_map
from tests.helpers.hf_models import FAMILIES, folder, model
from tests.helpers.values import ONE
from tests.helpers.wide_transformers import in_float64, module_of
from tests.hf.test_families import rows

pytest.importorskip("transformers")


def theirs(name: str) -> dict[str, Tensor]:
    made, tokens = copy.deepcopy(model(name)).double(), rows()
    made.config._experts_implementation = "eager"  # the other has no float64
    made.get_input_embeddings().padding_idx = None  # its row would have no gradient
    with in_float64(module_of(made)):
        scores = made(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        named = {n: w for n, w in made.named_parameters() if w.requires_grad}
        for old, new in Source(folder(name)).family.renamed:  # other names than in memory
            named = {re.sub(old, new, n): w for n, w in named.items()}
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return {n: g for n, g in zip(named, grads, strict=True) if g is not None}


def ours(source: Source, m: ModelConfig) -> dict[str, Tensor]:
    """The gradients of the weights of ``source`` in the model ``m``, as tensors of transformers."""
    spec = declare_model(m)
    trained = lambda x: x.requires_grad_() if x.is_floating_point() else x
    params = tree_map(trained, source.load(spec, ONE, torch.float64))
    forward(params, make_batch(rows(), ONE), m, ONE).backward()
    family = replace(source.family, weights={**source.family.weights, **source.family.stacked})
    out: dict[str, Tensor] = {}
    for w, (declared, place) in zip(flat(params), weights_of(m, family), strict=True):
        if declared.buffer or ".indexer." in declared.path:  # has a loss of its own
            continue
        p = pattern(place.row.pattern)
        g = w.grad.narrow(p.ours.index("v"), 0, m.vocab) if "v" in p.ours else w.grad
        g = pairs(g, rotary_columns(m)) if place.row.paired else g
        g = g.flip(0) if place.row.flipped else g
        for e, name in enumerate(place.names()):
            at = out.setdefault(name, torch.zeros(place.shape, dtype=torch.float64))
            p.put(at, g[e] if place.outside else g, place.sizes)
    return out


def difference(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest difference, as a share of the largest value of its weight."""
    assert got.keys() == want.keys()
    return max(
        ((got[n] - want[n]).abs().max() / want[n].abs().max()).item() for n in want if len(want[n])
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients(name):
    """The comparison notices another epsilon of the norms."""
    source, want = Source(folder(name)), theirs(name)
    assert difference(ours(source, source.model), want) <= 1e-5
    assert difference(ours(source, replace(source.model, norm_eps=1e-2)), want) > 1e-3
