"""Parameters and FLOPs of a model, counted from its declared weights."""

from __future__ import annotations

from dtron.model.config import ModelConfig
from dtron.model.transformer import declare_model
from dtron.params import WeightSpec, flat


def parameter_count(m: ModelConfig) -> int:
    return sum(w.numel for w in flat(declare_model(m)))


def active(w: WeightSpec, m: ModelConfig) -> float:
    """How much of a weight a token is multiplied by: of experts, its top k."""
    return w.numel * m.moe.top_k / m.moe.experts if "experts" in w.axes else float(w.numel)


def active_count(m: ModelConfig) -> int:
    """Parameters that one token uses."""
    return round(sum(active(w, m) for w in flat(declare_model(m))))


def flops_per_token(m: ModelConfig, seq_len: int) -> float:
    """Of forward and backward, without recomputation: 6 per weight that multiplies (all but
    embeddings that are looked up, and of experts those that a token goes to), and what the mixers
    add: for causal attention 6 * layers * heads * head_dim * seq_len, half of the full square
    (PaLM, arXiv:2204.02311, appendix B, halved). Multi-token prediction counts as the blocks and
    heads it has."""
    spec = declare_model(m)
    looked_up = sum(w.numel for w in flat(spec.embedding)) - (
        spec.embedding.w_tokens.numel if m.tied else 0
    )
    mixing = sum(m.mixer(p.letter).flops(seq_len, p.window) for p in spec.all_blocks)
    head = m.padded_vocab * m.embed * m.mtp.depth  # every module multiplies by it again
    return 6.0 * (active_count(m) - looked_up + head) + mixing
