"""Mixers on a GPU: compiled gradients with flex_attention and inductor's kernels are the gradients
of the eager reference, with packed documents."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dtron.layers.attention_mask import AttentionMask
from dtron.layers.cross_entropy import IGNORE
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.compute_config import ComputeConfig
from dtron.model.config import ModelConfig
from dtron.model.presets import preset
from dtron.moe.config import MoEConfig
from dtron.params import init
from dtron.training.compiled_stage import compiled
from dtron.training.gradients import gradients
from dtron.training.pipeline import one_stage, program
from dtron.tree import flat, tree_map

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_compiler")]
SEQ = 192
SPARSE = preset("tiny-deepseek-v3.2")
QWEN3_NEXT = preset("tiny-qwen3-next")
KIMI = replace(QWEN3_NEXT, pattern="KKKA", layers=4)
LLAMA4 = ModelConfig(
    pattern="AN",
    layers=2,
    window=48,
    window_kind="chunked",
    full_every=2,
    qk_norm=True,
    qk_norm_over="rotated",
    attention_temperature=0.7,
    attention_temperature_floor=32,
    moe=MoEConfig(4, 1, 64, score="sigmoid", normalize=False, scores_on="inputs"),
)
MODELS = {
    "gated delta net": replace(QWEN3_NEXT, layers=4),
    "kimi delta": KIMI,
    "mamba-2": replace(preset("tiny-nemotron-h"), layers=6),
    "sparse attention": replace(SPARSE, layers=2, indexer=replace(SPARSE.indexer, top_k=40)),
    "sparse attention, warm-up": replace(
        SPARSE, layers=2, indexer=replace(SPARSE.indexer, warmup=True)
    ),
    "chunks": LLAMA4,
}


def of_fixed_experts(m: ModelConfig) -> ModelConfig:
    """Tokens choose experts by a fixed rule, so that rounding sends no token to another expert."""
    return replace(m, moe=replace(m.moe, balanced=True)) if m.moe.experts else m


def both(m: ModelConfig, compute: torch.dtype) -> list[list[torch.Tensor]]:
    """Return the loss and gradients of the eager reference, and those of the compiled stage."""
    layout, m = Layout(compute=compute), of_fixed_experts(m)
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(m.vocab, (2, SEQ + 1), generator=g).cuda()
    rows[0, -5:] = IGNORE
    documents = (torch.rand(2, SEQ, generator=g) < 0.02).cumsum(1).cuda()
    batch = make_batch(rows, layout, documents, depth=m.mtp.depth)
    pipe = one_stage(m, 1, layout)
    params = tree_map(lambda w: w.cuda(), init(pipe.spec, m.dims(), 0, layout))
    found = []
    for kernel in ("reference", "auto"):
        functions = program(m, layout, ComputeConfig(attention_kernel=kernel))
        functions = compiled(functions, layout) if kernel == "auto" else functions
        loss, grads, _ = gradients(functions, params, [batch], 2 * SEQ - 5, pipe, 1)
        names = zip(flat(pipe.spec), flat(grads), strict=True)
        found.append([loss, *(x for w, x in names if not w.buffer)])
    return found


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert want.float().norm() > 0
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


@pytest.mark.parametrize("name", MODELS)
def test_compiled_gradients_are_those_of_the_reference(name):
    want, got = both(MODELS[name], torch.float32)
    errors = [error(a, b) for a, b in zip(got, want, strict=True)]
    assert max(errors) < 2e-3, errors


@pytest.mark.parametrize("name", MODELS)
def test_in_bfloat16(name):
    """The indexer may select other keys where scores are equal but for rounding."""
    want, got = both(MODELS[name], torch.bfloat16)
    errors = [error(a, b) for a, b in zip(got, want, strict=True)]
    assert errors[0] < 1e-3 and max(errors) < (0.3 if "sparse" in name else 6e-2), errors


def test_a_chunk_has_edges():
    """A mask without chunks gives other gradients, so the comparison would see it."""
    want = both(LLAMA4, torch.float32)[0]
    other = both(replace(LLAMA4, window_kind="sliding"), torch.float32)[1]
    assert AttentionMask(SEQ, 48, chunked=True) != AttentionMask(SEQ, 48)
    assert max(error(a, b) for a, b in zip(other, want, strict=True)) > 2e-2
