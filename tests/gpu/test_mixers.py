"""Mixers on a GPU: compiled gradients with flex_attention and inductor's kernels are the gradients
of the eager reference, with packed documents."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

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


def loss_and_gradients(
    m: ModelConfig, compute: torch.dtype, how: ComputeConfig | None = None
) -> list[torch.Tensor]:
    """Of the compiled stage. ``how``: None: of the eager reference."""
    layout, m = Layout(compute=compute), of_fixed_experts(m)
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(m.vocab, (2, SEQ + 1), generator=g).cuda()
    rows[0, -5:] = IGNORE
    documents = (torch.rand(2, SEQ, generator=g) < 0.02).cumsum(1).cuda()
    batch = make_batch(rows, layout, documents, depth=m.mtp.depth)
    pipe = one_stage(m, 1, layout)
    params = tree_map(lambda w: w.cuda(), init(pipe.spec, m.dims(), 0, layout))
    functions = program(m, layout, how or ComputeConfig(attention_kernel="reference"))
    functions = compiled(functions, layout) if how else functions
    loss, grads, _ = gradients(functions, params, [batch], 2 * SEQ - 5, pipe, 1)
    found = zip(flat(pipe.spec), flat(grads), strict=True)
    return [loss, *(x for w, x in found if not w.buffer)]


def errors(got: list[torch.Tensor], want: list[torch.Tensor]) -> list[float]:
    assert all(x.float().norm() > 0 for x in want)
    pairs = zip(got, want, strict=True)
    return [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs]


def assert_as_near(m: ModelConfig, how: ComputeConfig, factor: float) -> None:
    """In bfloat16 the compiled stage is as near to float32 as the eager reference."""
    truth = loss_and_gradients(m, torch.float32)
    want = errors(loss_and_gradients(m, torch.bfloat16), truth)
    got = errors(loss_and_gradients(m, torch.bfloat16, how), truth)
    assert max(a / (b + 1e-3) for a, b in zip(got, want, strict=True)) < factor, (got, want)
    assert max(got) < 0.3, got


@pytest.mark.parametrize("name", MODELS)
def test_compiled_gradients_are_those_of_the_reference(name):
    want = loss_and_gradients(MODELS[name], torch.float32)
    got = loss_and_gradients(MODELS[name], torch.float32, ComputeConfig())
    assert max(errors(got, want)) < 2e-3, errors(got, want)


@pytest.mark.parametrize("name", MODELS)
def test_in_bfloat16(name):
    """Rounding may change the keys that the indexer selects."""
    assert_as_near(MODELS[name], ComputeConfig(), 2 if "sparse" in name else 1.5)


def test_a_chunk_has_edges():
    """A mask without chunks gives other gradients, so the comparison would see it."""
    want = loss_and_gradients(LLAMA4, torch.float32)
    other = replace(LLAMA4, window_kind="sliding")
    assert max(errors(loss_and_gradients(other, torch.float32, ComputeConfig()), want)) > 2e-2
