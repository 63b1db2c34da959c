"""The model families of Hugging Face whose layers have a recurrent state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dtron.errors import UserError
from dtron.hf import recurrent_config as config
from dtron.hf import recurrent_tables as recurrent
from dtron.hf import weight_tables as tables
from dtron.hf.family import Family
from dtron.hf.rope_config import RopeFormat
from dtron.model.config import ModelConfig

_IGNORED = (r".*\.rotary_emb\.inv_freq", r"mtp\..*")

# ---------------------------------------------------------------------------- beyond the tables


def _letters(types: Any, layers: int, letters: Mapping[str, str]) -> str:
    """Return a pattern of letters: one for each of the layer_types. Raises UserError for an unknown
    type, and for another number of types than layers."""
    unknown = sorted(set(types) - set(letters))
    if unknown:
        raise UserError(f"layer_types has {', '.join(map(str, unknown))}")
    if len(types) != layers:
        raise UserError(f"layer_types has {len(types)} entries for {layers} layers")
    return "".join(letters[kind] for kind in types)


def _types(m: ModelConfig, names: Mapping[str, str]) -> list[str]:
    """Return the layer_types of a model, by the letters of its mixers."""
    return [names.get(m.letter(i), m.letter(i)) for i in range(m.layers)]


_QWEN3_NEXT = {"linear_attention": "L", "full_attention": "A"}


def _read_qwen3_next(entries: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Every 4th layer has full attention, and every layer has experts, if nothing else is said."""
    layers, types = fields["layers"], entries["layer_types"]
    if types is None:
        every, names = entries["full_attention_interval"], list(_QWEN3_NEXT)
        types = [names[(i + 1) % every == 0] for i in range(layers)]
    dense, step = entries["mlp_only_layers"] or [], entries["decoder_sparse_step"]
    sparse = [i not in dense and (i + 1) % step == 0 for i in range(layers)]
    return {
        "pattern": _letters(types, layers, _QWEN3_NEXT),
        "feed_forwards": "".join("DF"[one] for one in sparse),
    }


def _write_qwen3_next(m: ModelConfig) -> dict[str, Any]:
    return {
        "layer_types": _types(m, {letter: kind for kind, letter in _QWEN3_NEXT.items()}),
        "mlp_only_layers": [i for i in range(m.layers) if m.dense(i)] if m.moe.experts else [],
        "decoder_sparse_step": 1,
    }


# ---------------------------------------------------------------------------- families

_QWEN3_NEXT_NORMED = tables.zero_centered(tables.ENDS | tables.NORMS | tables.GATED_ATTENTION)

RECURRENT = (
    Family(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        weights=_QWEN3_NEXT_NORMED
        | recurrent.QWEN3_DELTA_NET
        | tables.MLP
        | tables.EXPERTS
        | tables.SHARED_EXPERT,
        keys=config.QWEN3_NEXT_KEYS,
        defaults=config.QWEN3_NEXT,
        fixed={"qk_norm": True, "attention_gate": True, "moe.shared_gate": True},
        demands={"hidden_act": "silu", "attention_bias": False},
        stacked=tables.STACKED_EXPERTS,
        ignored=_IGNORED,
        rope=RopeFormat(partial=0.25),
        read=_read_qwen3_next,
        write=_write_qwen3_next,
    ),
)
