"""The RoPE entries of config.json, as transformers understands them.

Two keys have held these entries: ``rope_scaling`` before version 5 of transformers, and
``rope_parameters``. If a config.json has both, ``rope_scaling`` counts. The base ``rope_theta`` is
an entry of this object, or of config.json, or the family's default.

YaRN multiplies cos and sin by one factor. It is ``attention_factor``, if given. If ``mscale`` and
``mscale_all_dim`` are both given, it is the quotient of their two temperatures. Otherwise it is the
paper's ``0.1 ln(factor) + 1``, and a lone ``mscale`` has no effect. DeepSeek's attention also
multiplies its scores by the temperature of ``mscale_all_dim``; the other families do not.

Left out: ``linear``, ``dynamic`` and ``longrope`` scaling, the rotation of a part of a head, and
RoPE that differs between layers. A config.json with one of them is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dtron.errors import UserError
from dtron.layers.rope import RopeConfig

# dtron's fields of RopeConfig, each with the Hugging Face key, for each RoPE scaling method.
_KEYS = {
    "llama3": {
        "factor": "factor",
        "original": "original_max_position_embeddings",
        "low": "low_freq_factor",
        "high": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original": "original_max_position_embeddings",
        "beta_slow": "beta_slow",
        "beta_fast": "beta_fast",
        "mscale": "mscale",
        "mscale_all": "mscale_all_dim",
        "attention_factor": "attention_factor",
        "truncate": "truncate",
    },
}
_REQUIRED = {
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_OPTIONAL = ("mscale", "mscale_all", "attention_factor", "truncate")  # not written if default


def object_of(entries: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """Return the JSON object of a key; empty if the key is missing or null."""
    value = entries.get(key) or {}
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {key} is {value!r}, and must be an object; mend {key}")
    return value


def read_rope(
    entries: Mapping[str, Any], context: int, where: str, *, latent: bool = False
) -> RopeConfig:
    """Return the RoPE of a config.json. Raises UserError for one that dtron does not compute.

    ``entries``: config.json, with the family's defaults.
    ``context``: the model's context in tokens, the default of the original context.
    ``where``: the name of config.json in errors.
    ``latent``: whether the model has DeepSeek's attention, whose scores have a temperature."""
    rope = object_of(entries, "rope_scaling", where) or object_of(entries, "rope_parameters", where)
    layered = [key for key, value in rope.items() if isinstance(value, Mapping)]
    if layered:
        raise UserError(
            f"{where}: RoPE differs between layers ({', '.join(layered)}); dtron has one RoPE for "
            "all layers"
        )
    theta = float(rope.get("rope_theta", entries["rope_theta"]))
    if rope.get("partial_rotary_factor", entries.get("partial_rotary_factor")) not in (None, 1.0):
        raise UserError(
            f"{where}: rotates part of a head only (partial_rotary_factor); dtron rotates all of it"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta)
    if kind not in _KEYS:
        known = ", ".join(["default", *_KEYS])
        raise UserError(f"{where}: rope_type {kind!r} is unknown; dtron has {known}")
    lacking = [key for key in _REQUIRED[kind] if key not in rope]
    if lacking:
        raise UserError(f"{where}: rope_type {kind!r} lacks {', '.join(lacking)}; add it")
    original = entries.get("original_max_position_embeddings")
    if original is None:
        original = rope.get("original_max_position_embeddings", context)
    known = {**rope, "original_max_position_embeddings": original}
    if kind == "yarn":
        known = _yarn(known, context, latent)
    elif latent and rope.get("mscale_all_dim"):
        raise UserError(f"{where}: mscale_all_dim with rope_type {kind!r}; dtron has it with yarn")
    values = {ours: known[theirs] for ours, theirs in _KEYS[kind].items() if theirs in known}
    if values.get("truncate") is None:
        values.pop("truncate", None)
    return RopeConfig(theta, kind, **values)


def _yarn(rope: Mapping[str, Any], context: int, latent: bool) -> dict[str, Any]:
    """Return the entries of yarn without those that have no effect, and with the factor on cos and
    sin where RopeConfig would compute another."""
    out = {key: value for key, value in rope.items() if value is not None}
    for key in ("beta_fast", "beta_slow"):
        if not out.get(key):  # 0 means the default, too
            out.pop(key, None)
    out.setdefault("factor", context / out["original_max_position_embeddings"])
    mscale, mscale_all = out.pop("mscale", None) or 0.0, out.pop("mscale_all_dim", None) or 0.0
    plain = RopeConfig(scaling="yarn", factor=out["factor"])
    if latent and mscale_all:
        out["mscale_all_dim"] = mscale_all
    if "attention_factor" in out:
        if not out["attention_factor"] > 0:
            raise UserError(
                f"attention_factor is {out['attention_factor']!r}, and must be over 0; change it"
            )
    elif not mscale_all:
        pass  # the paper's factor
    elif not mscale:
        if latent:
            out["attention_factor"] = plain.stretch(1.0)
    elif latent:
        out["mscale"] = mscale
    else:
        out["attention_factor"] = plain.stretch(mscale) / plain.stretch(mscale_all)
    return out


def explicit(rope: RopeConfig) -> RopeConfig:
    """Return the same RoPE in a form that config.json can express: with ``attention_factor``,
    where transformers would ignore ``mscale`` or take another value."""
    if rope.scaling != "yarn":
        return rope
    both = rope.mscale and rope.mscale_all
    if not rope.attention_factor and (both or (rope.mscale, rope.mscale_all) == (1.0, 0.0)):
        return rope
    return replace(rope, attention_factor=rope.attention_scaling, mscale=1.0)


def rope_entries(rope: RopeConfig) -> dict[str, Any]:
    """Return the entries in the format of transformers before version 5. Version 5 reads this
    format too."""
    if rope.scaling == "none":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    rope = explicit(rope)
    usual = RopeConfig()
    left_out = {name for name in _OPTIONAL if getattr(rope, name) == getattr(usual, name)}
    if rope.mscale_all and not rope.attention_factor:
        left_out.discard("mscale")  # without it transformers takes the paper's factor
    entries = {
        theirs: getattr(rope, ours)
        for ours, theirs in _KEYS[rope.scaling].items()
        if ours not in left_out
    }
    return {"rope_theta": rope.theta, "rope_scaling": {"rope_type": rope.scaling, **entries}}
