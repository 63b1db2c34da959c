"""A picture of what a model costs: its parameters and its FLOPs for a token."""

from __future__ import annotations

from collections import Counter

from dtron.model.config import ModelConfig
from dtron.model.flops import flops_per_token, parameter_count
from dtron.model.transformer import declare_model
from dtron.tools.charts import Scale
from dtron.tools.drawing import FAINT, Canvas
from dtron.tree import flat

FILL = "#4a8fd0"


def parameters(m: ModelConfig) -> dict[str, int]:
    """Return the parameters of a model by the kind of its weights."""
    found: Counter[str] = Counter()
    for w in flat(declare_model(m)):
        found[w.path.rpartition(".")[2]] += w.numel
    return dict(found)


def cost(
    layers: int = 4,
    embed: int = 512,
    heads: int = 8,
    kv_heads: int = 8,
    mlp: int = 1408,
    seq_len: int = 2048,
) -> str:
    """Draw the parameters of each kind of weight, above the FLOPs for a token. A head has
    embed / heads dims, and the vocabulary 32,000 tokens."""
    m = ModelConfig(
        vocab=32_000,
        embed=embed,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=embed // heads,
        mlp=mlp,
        context=seq_len,
    )
    found, canvas = parameters(m), Canvas(900)
    scale = Scale(max(found.values()), 150, 560)
    canvas.text(20, 24, f"{parameter_count(m):,} parameters", bold=True, size=16)
    for i, (name, n) in enumerate(found.items()):
        y = 40 + 24 * i
        canvas.text(20, y + 14, name)
        canvas.rect(150, y, max(scale.size(n), 1), 18, FILL)
        canvas.text(scale(n) + 8, y + 14, f"{n:,}", colour=FAINT)
    y = 40 + 24 * len(found) + 24
    flops = flops_per_token(m, seq_len)
    short = 2 * flops - flops_per_token(m, 2 * seq_len)  # attention grows with the length
    canvas.text(20, y, f"{flops / 1e6:,.0f} million FLOPs for a token", bold=True, size=16)
    share = 1 - short / flops
    canvas.text(20, y + 22, f"attention at {seq_len} tokens is {share:.0%} of them")
    each = short / parameter_count(m)
    canvas.text(20, y + 42, f"without attention, {each:.2f} FLOPs for each parameter")
    return canvas.svg()
