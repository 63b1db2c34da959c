"""Small models for the tests of generation, and their texts without any cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dtron.distributed.mesh_shape import MeshShape
from dtron.generation.cached_model import CachedModel
from dtron.generation.forward_inputs import decode_inputs, prefill_inputs
from dtron.generation.sampling import Sampling
from dtron.generation.scheduler import CacheSize, Piece, Request, Scheduler
from dtron.layers.gated_delta_net import DeltaNetConfig
from dtron.layers.mamba2 import Mamba2Config
from dtron.layers.mla import MLAConfig
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.transformer import declare_model, predict
from dtron.moe.config import MoEConfig
from dtron.params import init
from dtron.runtime.config import ModelConfig, RunConfig
from dtron.runtime.generation import generate
from dtron.training.pipeline import Pipeline, on_ranks, one_stage, pipeline
from tests.helpers.real_mesh import destroy_groups
from tests.helpers.runs import MODEL
from tests.helpers.values import ONE

M = replace(MODEL, qk_norm=False, context=64, init_std=0.3)
DELTA = DeltaNetConfig(key_heads=2, value_heads=4, key_dim=6, value_dim=5, chunk=4)
MODELS = {
    "grouped": replace(M, kv_heads=2, qk_norm=True),
    "window": replace(M, window=5),
    "chunked": replace(
        M,
        pattern="AN",
        window=5,
        window_kind="chunked",
        full_every=2,
        qk_norm=True,
        qk_norm_over="rotated",
        attention_temperature=0.7,
        attention_temperature_floor=3,
    ),
    "sinks": replace(M, sinks=True, window=5, full_every=2, qkv_bias=True, bias=True),
    "softcap": replace(M, softcap=2.0),
    "learned": replace(M, positions="learned", norm="layernorm", activation="gelu", tied=True),
    "latent": replace(M, mla=MLAConfig(kv_rank=12, q_rank=8, nope_dim=6, rope_dim=4, v_dim=5)),
    "experts": replace(M, moe=MoEConfig(experts=4, top_k=2, mlp=16)),
    "delta": replace(M, pattern="LA", delta=DELTA),
    "mamba": replace(
        M,
        pattern="SA",
        mamba=Mamba2Config(heads=4, head_dim=6, groups=2, state=8, chunk=4),
    ),
}
F64 = torch.float64


def weights(m: ModelConfig, layout: Layout = ONE, spec=None):
    spec = (declare_model(m),) if spec is None else spec
    return init(spec, m.dims(), 0, layout, F64)


def texts(*lengths: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(2)
    return [torch.randint(61, (n,), generator=g).tolist() for n in lengths]


def uncached(m: ModelConfig, text: Sequence[int], params=None) -> Tensor:
    """The logits after each token of a text."""
    rows = torch.tensor([[*text, 0]])
    with torch.no_grad():
        params = weights(m) if params is None else params
        return predict(params[0], make_batch(rows, ONE), m, ONE)


def greedy_text(m: ModelConfig, prompt: Sequence[int], tokens: int) -> list[int]:
    """The definition of greedy decoding: the whole text is run for each token."""
    text, params = list(prompt), weights(m)
    for _ in range(tokens):
        text.append(int(uncached(m, text, params)[-1].argmax()))
    return text


PIECES = [[3, 1, 4], [1, 1, 1], [6, 2, 1]]


def assert_cached(m: ModelConfig, pieces: list[list[int]] = PIECES, params=None) -> None:
    """Rows of unequal lengths, fed in these pieces, have the logits of whole rows."""
    params = weights(m) if params is None else params
    rows = texts(*map(sum, pieces))
    scheduler = Scheduler(CacheSize(len(rows), pages=64, page=4), 1)
    model = CachedModel(params, m, one_stage(m, 1, ONE), scheduler.size, "cpu")
    for i, row in enumerate(rows):
        generator = torch.Generator()
        scheduler.add(Request(i, row, len(row), 1, Sampling(0.0), frozenset(), generator))
    scheduler.plan()  # takes the pages
    found: list[list[Tensor]] = [[] for _ in rows]
    for step, counts in enumerate(zip(*pieces, strict=True)):
        now = [Piece(r, n) for r, n in zip(scheduler.running, counts, strict=True)]
        inputs, index = prefill_inputs(scheduler, now, tp=1)
        if step and set(counts) == {1}:
            inputs, index = decode_inputs(scheduler, now), [piece.request.row for piece in now]
        logits = model(inputs)
        for piece, i in zip(now, index, strict=True):
            found[piece.request.number].append(logits[i])
            scheduler.commit(piece)
    for row, cuts, got in zip(rows, pieces, found, strict=True):
        want, ends = uncached(m, row, params), torch.tensor(cuts).cumsum(0) - 1
        torch.testing.assert_close(torch.stack(got), want[ends], rtol=1e-5, atol=1e-5)


SOME = texts(5, 2, 7)  # outside, because every simulated rank would draw its own


def greedy(m: ModelConfig, params, pipe: Pipeline) -> list[list[int]]:
    return generate(params, SOME, 12, m, pipe, Sampling(0.0))


def on_mesh(
    m: ModelConfig, mesh: str, layout: Layout, device_mesh=None, run: Callable = greedy
) -> list[list[int]]:
    """The texts on the ranks of a mesh."""
    shape = MeshShape.parse(mesh)
    config = RunConfig(mesh=mesh, model=m)
    template = torch.empty(0, m.embed, dtype=F64)
    pipe = on_ranks(pipeline(config, shape, 1, config.data.seq_len, layout), device_mesh, template)
    found = run(m, weights(m, layout, pipe.spec), pipe)
    destroy_groups(pipe)
    return found
