"""Small models for the tests of generation, and their texts without any cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dtron.layers.gated_delta_net import DeltaNetConfig
from dtron.layers.mamba2 import Mamba2Config
from dtron.layers.mla import MLAConfig
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.transformer import declare_model, predict
from dtron.moe.config import MoEConfig
from dtron.params import init
from dtron.runtime.config import ModelConfig
from tests.helpers.runs import MODEL
from tests.helpers.values import ONE

M = replace(MODEL, qk_norm=False, context=64, init_std=0.3)
DELTA = DeltaNetConfig(key_heads=2, value_heads=4, key_dim=6, value_dim=5, chunk=4)
MODELS = {
    "grouped": replace(M, kv_heads=2, qk_norm=True),
    "window": replace(M, window=5),
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
