"""Chunked attention, a factor of queries by position, and a norm after rotation (Llama 4).

tests/hf compares them with transformers. Here are their definitions, and meshes."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtron.layers.attention_mask import AttentionMask, allowed, chunks_of_documents
from dtron.layers.attention_mixer import AttentionMixer, NoPEMixer
from dtron.model.config import ModelConfig
from dtron.planner.planned_attention import pairs
from dtron.testing import assert_caught
from tests.layers.test_context_parallel import assert_same_step, configured

LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=5)
LLAMA4 = {
    "pattern": "AN",
    "layers": 2,
    "window": 3,
    "window_kind": "chunked",
    "full_every": 2,
    "qk_norm": True,
    "qk_norm_over": "rotated",
    "attention_temperature": 0.7,
    "attention_temperature_floor": 3,
}


@given(lengths=LENGTHS, size=st.integers(1, 8), rows=st.integers(1, 2))
def test_a_chunk_begins_with_its_document(lengths, size, rows):
    """Two tokens are of one chunk if they are of one document, and their positions in it are."""
    seen = [(d, i // size) for d, n in enumerate(lengths) for i in range(n)]
    documents = torch.tensor([d for d, _ in seen] * rows)
    found = chunks_of_documents(documents, len(seen), size).unflatten(0, (rows, -1))
    same = torch.tensor([[a == b for a in seen] for b in seen])
    assert torch.equal(found[:, :, None] == found[:, None], same.expand(rows, -1, -1))


@given(s=st.integers(1, 20), window=st.none() | st.integers(1, 9), chunked=st.booleans())
def test_a_plan_counts_the_pairs_of_a_mask(s, window, chunked):
    mask = AttentionMask(s, window, chunked=chunked)
    assert pairs(mask, s, s) == allowed(mask, None, torch.device("cpu")).sum()


def test_flops():
    """6 for each pair, channel, and of keys and values. Of the diagonal a half counts."""
    m = ModelConfig(window=8, window_kind="chunked")
    count = pairs(AttentionMask(64, 8, chunked=True), 64, 64) - 64 / 2
    assert m.mixers[0].flops(64, 8) == 6 * m.heads * 2 * m.head_dim * count / 64


STEPS = {
    "tp=2": {},
    "dp=2,cp=2": {"documents": True, "zero": 3, "zigzag": "on"},
    "cp=2,tp=2": {"method": "allgather", "recompute": "full"},
    "cp=2": {"method": "ulysses", "documents": True},
    "pp=2,cp=2": {"batch": 4, "micro_batch": 1},
}


@pytest.mark.parametrize("mesh", STEPS)
def test_a_step_is_that_of_one_device(mesh):
    assert_same_step(configured(mesh, **LLAMA4 | STEPS[mesh]))


def on_mesh_alone(module, name, wrong):
    """Let a function differ on a mesh."""
    usual = getattr(module, name)

    def changed(*args, **choices):
        return (usual if args[-1].mesh is None else wrong)(*args, **choices)

    return mock.patch.object(module, name, changed)


def no_factor(self, positions_T, layout):
    return None


def windows(self, batch, window, layout):
    return AttentionMask(batch.seq_len, window), batch.documents_T


@pytest.mark.parametrize(
    ("mixer", "name", "wrong"),
    [(NoPEMixer, "query_factor", no_factor), (AttentionMixer, "_shape", windows)],
)
def test_mutants(mixer, name, wrong):
    """On the mesh there is no factor, or the chunks of documents are windows."""
    config = configured("cp=2", documents=True, **LLAMA4)
    with on_mesh_alone(mixer, name, wrong):
        assert_caught(lambda: assert_same_step(config))
