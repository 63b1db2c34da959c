"""Presets of models with a recurrent state; see presets.py."""

from __future__ import annotations

from dtron.layers.gated_delta_net import DeltaNetConfig
from dtron.layers.mamba2 import Mamba2Config
from dtron.layers.rope import RopeConfig
from dtron.model.config import ModelConfig
from dtron.moe.config import MoEConfig

_QWEN3_NEXT = ModelConfig(
    vocab=151936,
    embed=2048,
    layers=48,
    pattern="LLLA",
    heads=16,
    kv_heads=2,
    head_dim=256,
    mlp=5120,
    norm_eps=1e-6,
    rope=RopeConfig(1e7, partial=0.25),
    delta=DeltaNetConfig(key_heads=16, value_heads=32, key_dim=128, value_dim=128),
    context=262144,
    qk_norm=True,
    attention_gate=True,
    moe=MoEConfig(512, 10, 512, shared=512, shared_gate=True, aux_loss=0.001),
)

# A small model with all features of Qwen3-Next.
_TINY_QWEN3_NEXT = ModelConfig(
    embed=128,
    pattern="LLLA",
    heads=4,
    kv_heads=2,
    norm_eps=1e-6,
    rope=RopeConfig(partial=0.25),
    delta=DeltaNetConfig(key_heads=2, value_heads=4, key_dim=32, value_dim=32, chunk=32),
    qk_norm=True,
    attention_gate=True,
    moe=MoEConfig(8, 2, 64, shared=64, shared_gate=True, aux_loss=0.001),
)

# A small model with all features of Nemotron-H (arXiv:2504.03624): of ten blocks, four are Mamba-2,
# one is attention, and five are feed-forward layers.
_TINY_NEMOTRON_H = ModelConfig(
    embed=128,
    layers=10,
    pattern="S_S_N_S_S_",
    feed_forwards="_D",
    heads=4,
    kv_heads=2,
    mlp=512,
    activation="relu2",
    mamba=Mamba2Config(heads=8, groups=2, time_step_min=0.001),
)

# bench-1.3b (presets.py) with linear attention in three of four blocks.
_BENCH_HYBRID = ModelConfig(
    vocab=32768,
    embed=2048,
    layers=24,
    pattern="LLLA",
    heads=16,
    kv_heads=8,
    head_dim=128,
    mlp=5632,
    delta=DeltaNetConfig(key_heads=16, value_heads=16, key_dim=128, value_dim=128),
    context=4096,
)

RECURRENT: dict[str, ModelConfig] = {
    "tiny-qwen3-next": _TINY_QWEN3_NEXT,
    "tiny-nemotron-h": _TINY_NEMOTRON_H,
    "bench-1.3b-hybrid": _BENCH_HYBRID,
    "qwen3-next-80b-a3b": _QWEN3_NEXT,
}
