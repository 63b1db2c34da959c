"""Norms on outputs, norms over all heads, and scales: what a mesh could get wrong.

tests/training/test_compositions.py draws these models on all meshes, and tests/hf compares them
with transformers. Here are the mutants, one for each mechanism."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
from torch.distributed.tensor import DTensor

from dtron.distributed.mesh_shape import MeshShape
from dtron.layers import attention as attention_module
from dtron.layers.norm import HeadsNorm, Norm, norm_if, norm_over_heads
from dtron.losses import objective as loss_module
from dtron.model import block as block_module
from dtron.model import transformer as transformer_module
from dtron.testing import assert_caught
from dtron.tools.verify import on_one_device
from dtron.tools.verify_step import one_step
from tests.helpers.same_step import assert_same_result, model_config
from tests.helpers.values import ONE

CONFIG = model_config(
    "dp=2,tp=2",
    2,
    zero=1,
    batch=4,
    norm_position="sandwich",
    qk_norm=True,
    qk_norm_over="projection",
    residual_scale=0.5,
    embedding_scale=2.0,
    logit_scale=3.0,
    final_softcap=1.0,
)


def check():
    want = one_step(on_one_device(CONFIG), MeshShape())
    assert_same_result(want, one_step(CONFIG, MeshShape.parse(CONFIG.mesh)))


def norm_of_own_tokens(x, y, p, m):
    """The gradient of the norm on an output is not summed over the ranks' tokens."""
    if p is not None and isinstance(y, DTensor):
        own = norm_if(Norm(p.scale.to_local(), None), y.to_local(), m.norm_eps)
        y, p = DTensor.from_local(own, y.device_mesh, y.placements), None
    return x + m.residual_scale * norm_if(p, y, m.norm_eps)


def norm_over_own_heads(p, x_TNH, eps, layout):
    """The statistics are those of a rank's own heads."""
    heads = ("tokens", "heads", None)
    region = layout.local_map(
        lambda x, scale: norm_over_heads(HeadsNorm(scale), x, eps, ONE), (heads, heads[1:]), heads
    )
    return region(x_TNH, p.scale)


def scale_of_each_rank(p, tokens_T, positions_T, layout, scale=1.0):
    """Each rank of tp multiplies the embedding once more."""
    return EMBEDDING(p, tokens_T, positions_T, layout, scale * layout.parts("vocab"))


def cap_of_one_device(x, w, targets_T, loss, layout):
    """The mesh leaves out the soft-cap."""
    loss = loss if layout.mesh is None else replace(loss, softcap=None)
    return CROSS_ENTROPY(x, w, targets_T, loss, layout)


EMBEDDING, CROSS_ENTROPY = transformer_module.embedding, loss_module.cross_entropy
MUTANTS = [
    (block_module, "_add", norm_of_own_tokens),
    (attention_module, "norm_over_heads", norm_over_own_heads),
    (transformer_module, "embedding", scale_of_each_rank),
    (loss_module, "cross_entropy", cap_of_one_device),
]


def test_the_mesh_is_one_device():
    check()


@pytest.mark.parametrize(("module", "name", "mutant"), MUTANTS)
def test_mutants(module, name, mutant):
    with mock.patch.object(module, name, mutant):
        assert_caught(check)
