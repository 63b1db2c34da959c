"""Parameters and FLOPs of a model, counted from its declared weights."""

from __future__ import annotations

from dataclasses import replace

from dtron.model.config import ModelConfig
from dtron.model.lora import NO_LORA, LoraConfig, with_lora
from dtron.model.transformer import declare_model
from dtron.params import WeightSpec
from dtron.tree import flat


def parameter_count(m: ModelConfig) -> int:
    """Count the parameters of a model."""
    return sum(w.numel for w in flat(declare_model(m)))


def active(w: WeightSpec, m: ModelConfig) -> float:
    """Return the number of a weight's elements that multiply a token: a token uses top k of the
    experts."""
    return w.numel * m.moe.top_k / m.moe.experts if "experts" in w.axes else float(w.numel)


def active_count(m: ModelConfig) -> int:
    """Count the parameters that one token uses."""
    return round(sum(active(w, m) for w in flat(declare_model(m))))


def flops_per_token(m: ModelConfig, seq_len: int, lora: LoraConfig = NO_LORA) -> float:
    """Return the FLOPs of forward and backward per token, without recomputation.

    A weight that multiplies a token counts 6, and 4 if it is frozen, because its gradient is not
    computed. Embeddings are looked up and do not count; of the experts, only the token's own count.
    Mixers add their ``flops``. For causal attention ``flops`` is 6 * layers * heads * head_dim *
    seq_len, half of the full square (PaLM, arXiv:2204.02311, appendix B, halved). Multi-token
    prediction counts by its blocks and heads."""
    spec = with_lora(declare_model(m), replace(lora, quantize_base="none"))
    assert spec.embedding is not None
    looked_up = {w.path for w in flat(spec.embedding)}
    if m.tied:
        looked_up.remove(spec.embedding.w_tokens.path)
    each = [(4 if w.frozen else 6) * active(w, m) for w in flat(spec) if w.path not in looked_up]
    mixing = sum(m.mixer(p.letter).flops(seq_len, p.window) for p in spec.all_blocks)
    head = m.padded_vocab * m.embed * m.mtp.depth  # every module uses the head again
    return sum(each) + (4 if lora.rank else 6) * head + mixing
