"""The layers with a sliding window in config.json, family by family.

mistral and mixtral have a window in all layers or in none: ``sliding_window``. In other families a
layer has the type ``sliding_attention`` or ``full_attention``. ``layer_types`` lists the types; if
it is missing, each family computes them in its own way. dtron has windows in no layer, in all
layers, or in all but every nth layer. Another list is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dtron.errors import UserError
from dtron.model.config import ModelConfig

_KINDS = ("sliding_attention", "full_attention")


def _window_of(entries: Mapping[str, Any], types: Sequence[str]) -> dict[str, Any]:
    """Return the fields of the window of layers with these types. Raises UserError if dtron has no
    such sequence of layers."""
    sliding = [kind == "sliding_attention" for kind in types]
    if not set(types) <= {"sliding_attention", "full_attention"}:
        raise UserError(f"layer_types has {', '.join(sorted(set(types)))}")
    if not any(sliding):
        return {"window": None, "full_every": 0}
    if entries["sliding_window"] is None:
        raise UserError("layer_types has layers with a window, and sliding_window is not given")
    period = 0 if all(sliding) else sliding.index(False) + 1
    if period and sliding != [(i + 1) % period != 0 for i in range(len(types))]:
        raise UserError(
            f"layer_types is {list(types)}: the layers without a window are not every nth"
        )
    return {"window": entries["sliding_window"], "full_every": period}


def _types_of(m: ModelConfig) -> list[str]:
    """Return the layer_types of a model with a window."""
    full = [m.full_every and (i + 1) % m.full_every == 0 for i in range(m.layers)]
    return ["full_attention" if one else "sliding_attention" for one in full]


def _given_types(entries: Mapping[str, Any], usual: list[str]) -> list[str]:
    types = entries["layer_types"]
    if types is None:
        return usual
    if len(types) != len(usual):
        raise UserError(f"layer_types has {len(types)} entries for {len(usual)} layers")
    return types


def read_qwen(entries: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Layers from ``max_window_layers`` on have a window, if windows are used at all."""
    window = entries["sliding_window"] if entries["use_sliding_window"] else None
    first = fields["layers"] if window is None else entries["max_window_layers"]
    kinds = ("full_attention", "sliding_attention")
    types = _given_types(entries, [kinds[i >= first] for i in range(fields["layers"])])
    return _window_of({"sliding_window": window}, types)


def write_qwen(m: ModelConfig) -> dict[str, Any]:
    if m.window is None:
        return {"use_sliding_window": False}
    more = {"max_window_layers": 0, "layer_types": _types_of(m)}
    return {"use_sliding_window": True, "sliding_window": m.window, **more}


def read_qwen3_moe(entries: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"window": entries["sliding_window"] if entries["use_sliding_window"] else None}


def write_qwen3_moe(m: ModelConfig) -> dict[str, Any]:
    return {"use_sliding_window": m.window is not None, "sliding_window": m.window}


def read_gpt_oss(entries: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The first and then every other layer has a window, if nothing else is said."""
    return read_periodic(entries, fields, 2)


def read_periodic(
    entries: Mapping[str, Any], fields: Mapping[str, Any], period: int
) -> dict[str, Any]:
    """All but every layer of the number ``period`` have a window, if nothing else is said."""
    full = [(i + 1) % period == 0 for i in range(fields["layers"])]
    return _window_of(entries, _given_types(entries, [_KINDS[one] for one in full]))


def read_smollm3(entries: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Layers without positions (NoPE) have a window, if windows are used and nothing else is
    said."""
    layers, rotated = fields["layers"], entries["no_rope_layers"]
    if rotated is None:
        rotated = [(i + 1) % entries["no_rope_layer_interval"] != 0 for i in range(layers)]
    if len(rotated) < layers:
        raise UserError(f"no_rope_layers has {len(rotated)} entries for {layers} layers")
    rotated = [bool(one) for one in rotated[:layers]]
    used = entries["use_sliding_window"] and entries["sliding_window"] is not None
    types = _given_types(entries, [_KINDS[one or not used] for one in rotated])
    return _window_of(entries, types) | {"pattern": "".join("NA"[one] for one in rotated)}


def write_smollm3(m: ModelConfig) -> dict[str, Any]:
    rotated = [int(m.letter(i) != "N") for i in range(m.layers)]
    return {
        "no_rope_layers": rotated,
        "use_sliding_window": m.window is not None,
        **write_windows(m),
    }


def write_windows(m: ModelConfig) -> dict[str, Any]:
    if m.window is None:
        return {"sliding_window": None, "layer_types": ["full_attention"] * m.layers}
    return {"sliding_window": m.window, "layer_types": _types_of(m)}


def read_llama4(entries: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Layers that rotate have chunks, if there are chunks and nothing else is said."""
    layers, rotated = fields["layers"], entries["no_rope_layers"]
    if not rotated:
        rotated = [(i + 1) % entries["no_rope_layer_interval"] != 0 for i in range(layers)]
    if len(rotated) < layers:
        raise UserError(f"no_rope_layers has {len(rotated)} entries for {layers} layers")
    rotated = [bool(one) for one in rotated[:layers]]
    size, names = entries["attention_chunk_size"], {"chunked_attention": "sliding_attention"}
    types = _given_types(entries, [_KINDS[not (one and size is not None)] for one in rotated])
    if "sliding_attention" in (entries["layer_types"] or ()):
        raise UserError("layer_types has sliding_attention")
    types = [names.get(kind, kind) for kind in types]
    tuned = entries["attn_temperature_tuning"] and not all(rotated)
    return {
        **_window_of({"sliding_window": size}, types),
        "pattern": "".join("NA"[one] for one in rotated),
        "attention_temperature": entries["attn_scale"] if tuned else 0.0,
    }


def write_llama4(m: ModelConfig) -> dict[str, Any]:
    kinds = {"sliding_attention": "chunked_attention"}
    types = ["full_attention"] * m.layers if m.window is None else _types_of(m)
    return {
        "no_rope_layers": [int(m.letter(i) != "N") for i in range(m.layers)],
        "attention_chunk_size": m.window,
        "layer_types": [kinds.get(kind, kind) for kind in types],
        "attn_temperature_tuning": m.attention_temperature > 0,
        "attn_scale": m.attention_temperature,
    }
