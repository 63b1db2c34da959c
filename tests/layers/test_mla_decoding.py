"""Latent attention in generation is latent attention, with a cache of latents."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dtron.generation.cached_model import page_bytes
from dtron.model.lora import LoraConfig, with_lora
from dtron.model.transformer import declare_model
from dtron.params import init
from dtron.testing import assert_caught
from dtron.training.pipeline import one_stage
from dtron.tree import flat, leaves, tree_map
from tests.generation.models import F64, MODELS, assert_cached
from tests.helpers.values import ONE

M = MODELS["latent"]
VARIANTS = {
    "a latent of queries": M,
    "whole queries": replace(M, mla=replace(M.mla, q_rank=0)),
    "no positions": replace(M, pattern="P"),
    "a temperature": replace(M, attention_scale=0.2),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_logits_of_whole_heads(name):
    assert_cached(VARIANTS[name])


@pytest.mark.parametrize("config", [LoraConfig(3), LoraConfig(3, dora=True)], ids=["lora", "dora"])
def test_an_updated_projection_is_absorbed(config):
    """The up-projection has an update, which the cache of latents must not lose."""
    spec = (with_lora(declare_model(M), config),)
    params = init(spec, M.dims(), 0, ONE, F64)
    g = torch.Generator().manual_seed(5)
    paths = [path for path, _ in leaves(params)]
    updated = [
        torch.randn(w.shape, generator=g, dtype=F64) if path.endswith("lora_b") else w
        for path, w in zip(paths, flat(params), strict=True)
    ]
    values = iter(updated)
    params = tree_map(lambda _: next(values), params)
    assert any("w_kv_up.lora_b" in path for path in paths)
    assert_cached(M, params=params)


@pytest.mark.parametrize("what", ["nope", "scale"])
def test_a_wrong_absorption_is_caught(what, monkeypatch):
    """The scale of absorbed queries; the values' part of the up-projection."""
    from dtron.layers import mla_decoding

    wrong = {
        "scale": ("replace", lambda x, **k: replace(x, **({} if "scale" in k else k))),
        "nope": ("_whole", lambda w, c, layout: w.flip(-1)),
    }[what]
    monkeypatch.setattr(mla_decoding, *wrong)
    assert_caught(lambda: assert_cached(M))


def test_a_page_has_latents():
    a_token = (M.mla.kv_rank + M.mla.rope_dim) * 8
    assert page_bytes(M, one_stage(M, 1, ONE), 4, F64) == M.layers * 4 * a_token
