"""Cutting a model into the stages of a pipeline."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from dtron.model.stages import layers_per_stage, split_into_stages
from dtron.model.transformer import declare_model
from dtron.runtime.config import ModelConfig
from dtron.tree import flat
from tests.helpers.runs import MODEL


@given(st.integers(1, 12), st.integers(0, 40), st.sampled_from([100, 5000, 200000]))
def test_layers_are_dealt_out_evenly(stages, more, vocab):
    m = ModelConfig(vocab=vocab, layers=stages + more)
    got = layers_per_stage(m, stages, 256)
    assert sum(got) == m.layers and min(got) >= 1 and len(got) == stages
    assert (
        max(got[:-1], default=0) - min(got[:-1], default=0) <= 1
    )  # without the last stage, which has the head
    if stages > 1:
        assert got[-1] <= max(got[:-1])


def test_the_head_counts_as_the_blocks_it_costs():
    """llama3-8b: a block multiplies by 218 M weights, the head by 525 M."""
    from dtron.model.presets import preset

    m = preset("llama3-8b")
    assert layers_per_stage(m, 4, 8192) == [9, 9, 8, 6]
    assert layers_per_stage(m, 2, 8192) == [17, 15]
    assert layers_per_stage(m, 2, 8192, [20, 12]) == [20, 12]


def test_stages_together_are_the_model():
    for tied in (False, True):
        m = replace(MODEL, layers=5, tied=tied)
        stages = split_into_stages(m, [2, 2, 1])
        paths = [w.path for s in stages for w in flat(s) if not w.twin]
        assert sorted(paths) == sorted(w.path for w in flat(declare_model(m)))
        twins = [w.path for s in stages for w in flat(s) if w.twin]
        assert twins == (["embedding.w_tokens"] if tied else [])
