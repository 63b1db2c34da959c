"""Known models by name, as their published config files describe them.

The vocabulary is the published vocabulary. ``vocab_multiple`` pads the embedding's rows for speed,
which does not change the model. A test counts the parameters of each model and compares the count
with the published number.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any

from dtron.errors import UserError
from dtron.layers.lightning_indexer import IndexerConfig
from dtron.layers.mla import MLAConfig
from dtron.layers.rope import RopeConfig
from dtron.model.config import ModelConfig
from dtron.model.mtp import MTPConfig
from dtron.model.recurrent_presets import RECURRENT
from dtron.moe.config import MoEConfig


def _llama(
    vocab: int,
    embed: int,
    layers: int,
    heads: int,
    kv_heads: int,
    mlp: int,
    context: int,
    **more: Any,
) -> ModelConfig:
    """Make a model of Llama's architecture, with heads of width 128.

    ``more``: other fields of ``ModelConfig``."""
    return ModelConfig(
        vocab=vocab,
        embed=embed,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        mlp=mlp,
        context=context,
        **{"head_dim": 128, **more},
    )


def _gpt2(embed: int, layers: int, heads: int) -> ModelConfig:
    return ModelConfig(
        vocab=50257,
        embed=embed,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=64,
        mlp=4 * embed,
        activation="gelu",
        norm="layernorm",
        positions="learned",
        context=1024,
        qkv_bias=True,
        bias=True,
        tied=True,
    )


# Qwen 2.5 and 3.
_QWEN: dict[str, Any] = {"rope": RopeConfig(1e6), "norm_eps": 1e-6}


def _qwen2(
    embed: int, layers: int, heads: int, kv_heads: int, mlp: int, vocab: int, **more: Any
) -> ModelConfig:
    more = {**_QWEN, "qkv_bias": True, **more}
    return _llama(vocab, embed, layers, heads, kv_heads, mlp, 32768, **more)


def _qwen3(
    embed: int, layers: int, heads: int, kv_heads: int, mlp: int, **more: Any
) -> ModelConfig:
    more = {**_QWEN, "qk_norm": True, **more}
    return _llama(151936, embed, layers, heads, kv_heads, mlp, 40960, **more)


def _stretched(factor: float) -> RopeConfig:
    """Extend the context of Llama 3.1 and 3.2 from 8,192 tokens to 131,072."""
    return RopeConfig(5e5, "llama3", factor, 8192, 1.0, 4.0)


def _qwen3_moe(
    embed: int, layers: int, heads: int, kv_heads: int, mlp: int, **moe: Any
) -> ModelConfig:
    """Make a Qwen 3 with 128 experts of width ``mlp``, of which a token uses 8."""
    llama = _qwen3(embed, layers, heads, kv_heads, 8 * mlp)
    return replace(llama, moe=MoEConfig(128, 8, mlp, **moe))


_MIXTRAL = replace(
    _llama(32000, 4096, 32, 32, 8, 14336, 32768, rope=RopeConfig(1e6)),
    moe=MoEConfig(8, 2, 14336, aux_loss=0.02),
)
_GPT_OSS = replace(
    _llama(201088, 2880, 24, 64, 8, 2880, 131072, head_dim=64),
    rope=RopeConfig(1.5e5, "yarn", 32.0, 4096, truncate=False),
    qkv_bias=True,
    bias=True,
    sinks=True,
    window=128,
    full_every=2,
    moe=MoEConfig(
        32,
        4,
        2880,
        score="topk_softmax",
        router_bias=True,
        activation="clamped_swiglu",
        bias=True,
        aux_loss=0.001,
    ),
)


def _deepseek(
    vocab: int, embed: int, layers: int, heads: int, mlp: int, moe: MoEConfig, **more: Any
) -> ModelConfig:
    """Make a DeepSeek V2 or V3: latent attention, and a context extended from 4,096 tokens to
    163,840.

    ``more``: other fields of ``ModelConfig``; at least ``mla`` and ``rope``."""
    return ModelConfig(
        vocab=vocab,
        embed=embed,
        layers=layers,
        heads=heads,
        mlp=mlp,
        moe=moe,
        norm_eps=1e-6,
        context=163840,
        **more,
    )


def _yarn(mscale: float) -> RopeConfig:
    """Make DeepSeek's rotary angles. V2 and V3 differ in the temperature."""
    return RopeConfig(1e4, "yarn", 40.0, 4096, mscale=mscale, mscale_all=mscale)


_V2_LITE = _deepseek(
    102400,
    2048,
    27,
    16,
    10944,
    MoEConfig(
        64,
        6,
        1408,
        dense_layers=1,
        normalize=False,
        shared=2816,
        aux_loss=0.001,
        aux_level="sequence",
    ),
    mla=MLAConfig(512, 0),
    rope=_yarn(0.707),
)
_V3 = _deepseek(
    129280,
    7168,
    61,
    128,
    18432,
    MoEConfig(
        256,
        8,
        2048,
        dense_layers=3,
        score="sigmoid",
        scale=2.5,
        groups=8,
        group_top_k=4,
        shared=2048,
        aux_loss=0.0001,
        aux_level="sequence",
        bias_rate=0.001,
    ),
    mla=MLAConfig(512, 1536),
    rope=_yarn(1.0),
    mtp=MTPConfig(1),
)

_V32 = replace(_V3, pattern="I", indexer=IndexerConfig(64, 128, 2048))

# A small DeepSeek-V3 with all of its features.
_TINY_DEEPSEEK = ModelConfig(
    embed=64,
    layers=3,
    heads=4,
    mlp=192,
    norm_eps=1e-6,
    mla=MLAConfig(32, 48, 32, 16, 32),
    mtp=MTPConfig(1),
    moe=replace(
        _V3.moe,
        experts=8,
        top_k=2,
        mlp=48,
        dense_layers=1,
        groups=4,
        group_top_k=2,
        shared=48,
    ),
)

_TINY_SPARSE = replace(
    _TINY_DEEPSEEK, pattern="I", mtp=MTPConfig(), indexer=IndexerConfig(8, 32, 128)
)

# llama3-8b and qwen3-30b-a3b with 6 layers of them; here every expert has the same load.
_BENCH_8B = _llama(32768, 4096, 6, 32, 8, 14336, 4096)
_BENCH_MOE = replace(
    _qwen3_moe(2048, 6, 32, 4, 768, balanced=True),
    vocab=32768,
    context=4096,
)


# fmt: off
PRESETS: dict[str, ModelConfig] = {
    "tiny":           ModelConfig(),
    "tiny-moe":       ModelConfig(
        embed=128, layers=2, heads=4, kv_heads=2, moe=MoEConfig(8, 2, 128, aux_loss=0.01)
    ),
    "tiny-deepseek":  _TINY_DEEPSEEK,
    "tiny-deepseek-v3.2": _TINY_SPARSE,
    "bench-1.3b":     _llama(32768, 2048, 24, 16, 8, 5632, 4096),
    "bench-8b-width": _BENCH_8B,
    "bench-moe":      _BENCH_MOE,
    #                       embed layers heads
    "gpt2-124m":     _gpt2(   768,    12,   12),
    "gpt2-350m":     _gpt2(  1024,    24,   16),
    "gpt2-774m":     _gpt2(  1280,    36,   20),
    "gpt2-1.5b":     _gpt2(  1600,    48,   25),
    #                        vocab  embed layers heads kv    mlp context
    "llama2-7b":     _llama( 32000,  4096,    32,  32, 32, 11008,   4096),
    "llama2-13b":    _llama( 32000,  5120,    40,  40, 40, 13824,   4096),
    "llama2-70b":    _llama( 32000,  8192,    80,  64,  8, 28672,   4096),
    "mistral-7b":    _llama( 32000,  4096,    32,  32,  8, 14336,  32768, window=4096),
    "llama3-8b":     _llama(128256,  4096,    32,  32,  8, 14336,   8192, rope=RopeConfig(5e5)),
    "llama3-70b":    _llama(128256,  8192,    80,  64,  8, 28672,   8192, rope=RopeConfig(5e5)),
    "llama3.1-8b":   _llama(128256,  4096,    32,  32,  8, 14336, 131072, rope=_stretched(8)),
    "llama3.1-70b":  _llama(128256,  8192,    80,  64,  8, 28672, 131072, rope=_stretched(8)),
    "llama3.1-405b": _llama(128256, 16384,   126, 128,  8, 53248, 131072, rope=_stretched(8)),
    "llama3.2-1b":   _llama(128256,  2048,    16,  32,  8,  8192, 131072, rope=_stretched(32),
                            tied=True, head_dim=64),
    "llama3.2-3b":   _llama(128256,  3072,    28,  24,  8,  8192, 131072, rope=_stretched(32),
                            tied=True),
    #                        embed layers heads kv   mlp   vocab
    "qwen2.5-0.5b":  _qwen2(   896,    24,  14,  2,  4864, 151936, tied=True, head_dim=64),
    "qwen2.5-1.5b":  _qwen2(  1536,    28,  12,  2,  8960, 151936, tied=True),
    "qwen2.5-7b":    _qwen2(  3584,    28,  28,  4, 18944, 152064),
    "qwen3-0.6b":    _qwen3(  1024,    28,  16,  8,  3072, tied=True),
    "qwen3-1.7b":    _qwen3(  2048,    28,  16,  8,  6144, tied=True),
    "qwen3-4b":      _qwen3(  2560,    36,  32,  8,  9728, tied=True),
    "qwen3-8b":      _qwen3(  4096,    36,  32,  8, 12288),
    "qwen3-14b":     _qwen3(  5120,    40,  40,  8, 17408),
    "qwen3-32b":     _qwen3(  5120,    64,  64,  8, 25600),
    "mixtral-8x7b":  _MIXTRAL,
    #                            embed layers heads kv   mlp
    "qwen3-30b-a3b":   _qwen3_moe(2048,    48,  32,  4,  768, aux_loss=0.001),
    "qwen3-235b-a22b": _qwen3_moe(4096,    94,  64,  4, 1536, aux_loss=0.001),
    "gpt-oss-20b":     _GPT_OSS,
    "deepseek-v2-lite": _V2_LITE,
    "deepseek-v3":      _V3,
    "deepseek-v3.2":    _V32,
    **RECURRENT,
}
# fmt: on


def preset(name: str) -> ModelConfig:
    """Return the model of this name. Raises UserError for an unknown name, with the nearest
    names."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.3) or list(PRESETS)[:3]
        raise UserError(f"--model {name}: unknown; did you mean {' or '.join(near)}?")
    return PRESETS[name]
