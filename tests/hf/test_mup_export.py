"""A model with muP is exported as the model that transformers computes: the same logits."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from dtron.hf import Source
from dtron.hf.mup_factor import mup_factor
from dtron.model.mtp import MTPConfig
from dtron.model.transformer import declare_model
from dtron.runtime.cli import parse
from dtron.runtime.config import ModelConfig
from dtron.runtime.export_run import export_run
from dtron.tree import flat
from tests.helpers.hf_models import FAMILIES, folder
from tests.helpers.texts import one_line
from tests.hf.test_families import as_run, logits, theirs

hf = pytest.importorskip("transformers")


def with_mup(source: Source, base_head: int = 4) -> Source:
    """The same weights in a model that is 64 / 48 as wide as its base. Heads have grown too."""
    source.model = replace(source.model, mup_base_width=48, mup_base_head_dim=base_head)
    return source


def exported(source: Source, path) -> torch.nn.Module:
    path.mkdir()
    as_run(source, path)
    export_run(path, path / "out", dtype=torch.float32, family=source.family.kind)
    return hf.AutoModelForCausalLM.from_pretrained(
        path / "out", dtype=torch.float32, attn_implementation="eager"
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_logits(name, tmp_path):
    rotated = Source(folder(name)).model.qk_norm_over == "rotated"  # its heads may not grow
    source = with_mup(Source(folder(name)), 0 if rotated else 4)
    want = logits(source)
    got = theirs(exported(source, tmp_path / "mup"))
    assert (got - want).abs().max() <= 1e-4
    assert (logits(Source(folder(name))) - want).abs().max() > 1e-2
    if rotated:
        return
    # A mutant: without the factor of attention scores.
    halved = lambda m, path: mup_factor(replace(m, mup_base_head_dim=0), path)
    with mock.patch("dtron.hf.export.mup_factor", halved):
        other = theirs(exported(source, tmp_path / "mutant"))
    assert (other - want).abs().max() > 1e-3


def test_the_weights_with_a_factor():
    m = ModelConfig(mup_base_width=64, mup_base_head_dim=8, layers=2, qkv_bias=True)
    m = replace(m, mtp=MTPConfig(depth=1))
    factors = {w.path: mup_factor(m, w.path) for w in flat(declare_model(m))}
    assert {path: f for path, f in factors.items() if f != 1} == {
        **{
            f"{block}.attention.{name}": 0.5
            for block in ("blocks.0", "blocks.1", "mtp.0.block")
            for name in ("w_q", "b_q")
        },
        "norm.scale": 0.25,
        "mtp.0.norm.scale": 0.25,
    }
    plain = replace(m, mup_base_width=0, mup_base_head_dim=0)
    assert {mup_factor(plain, path) for path in factors} == {1.0}


def test_published_weights_have_no_mup():
    flags = [f"--init-from={folder('llama')}", "--model.mup-base-width=32"]
    one_line(lambda: parse(flags), "--model.mup-base-width 32", "has 0", "drop")
