"""Conversion of config.json to ModelConfig and back, by the tables of families.py.

Both directions check each other: a family can express a model if the config.json that would be
written reads back as the same model. The check leaves out only fields that do not change the
function, like the weight of a loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from dtron.errors import UserError
from dtron.hf.families import FAMILIES, Family
from dtron.hf.safetensors import read_json
from dtron.layers.rope import RopeConfig
from dtron.model.config import ModelConfig
from dtron.model.mtp import MTPConfig
from dtron.moe.config import MoEConfig

CONFIG = "config.json"

# Fields of a loaded model that a flag may change: training options, context, window and RoPE.
FREE = (
    "context",
    "window",
    "rope",
    "z_loss",
    "init_std",
    "vocab_multiple",
    "mtp",
    "moe.aux_loss",
    "moe.aux_level",
    "moe.z_loss",
    "moe.bias_rate",
    "moe.capacity_factor",
)


def read_config(folder: Path) -> tuple[Family, ModelConfig]:
    """Return the family and the model of a folder. Raises UserError for an architecture that dtron
    does not have, and for an option of an architecture that dtron does not compute."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: is no folder; give a model's folder, with config.json and safetensors"
        )
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: has no {CONFIG}; give the folder of a model from Hugging Face")
    entries = read_json(path)
    family = family_of(entries, str(path))
    return family, from_hf(entries, family, str(path))


def family_of(entries: Mapping[str, Any], where: str = CONFIG) -> Family:
    names = entries.get("architectures") or []
    if not isinstance(names, list):
        raise UserError(
            f"{where}: architectures is {names!r}, and must be a list of names; download it again"
        )
    for family in FAMILIES:
        if family.architecture in names or (not names and entries.get("model_type") == family.kind):
            return family
    what = ", ".join(map(str, names)) or entries.get("model_type") or "none"
    known = ", ".join(f.architecture for f in FAMILIES)
    raise UserError(f"{where}: architecture {what} is unknown; dtron has {known}")


def from_hf(entries: Mapping[str, Any], family: Family, where: str = CONFIG) -> ModelConfig:
    """Return the model that a config.json describes. Raises UserError for an incomplete
    config.json, and for an option that dtron does not compute."""
    try:
        return _model(entries, family, where)
    except (TypeError, ArithmeticError, AttributeError) as error:
        raise UserError(
            f"{where}: a value has another type than it must have ({error}); download it again"
        ) from error


def _model(entries: Mapping[str, Any], family: Family, where: str) -> ModelConfig:
    if entries.get("quantization_config"):
        method = _object(entries, "quantization_config", where).get("quant_method", "some method")
        raise UserError(
            f"{where}: weights are quantised by {method}; give a checkpoint in bfloat16"
        )
    for key, only in family.demands.items():
        if entries.get(key, only) != only:
            raise UserError(
                f"{where}: {key} is {entries[key]!r}, and dtron computes {family.kind} with "
                f"{only!r}"
            )
    values: dict[str, Any] = {}
    for ours, theirs in family.keys.items():
        names = theirs.split("|")
        found = next((name for name in names if name in entries), None)
        if found is None and names[0] not in family.defaults:
            raise UserError(
                f"{where}: lacks {names[0]}, which every {family.kind} has; download it again"
            )
        values[ours] = family.defaults.get(names[0]) if found is None else entries[found]
    values["kv_heads"] = values.get("kv_heads") or values["heads"]
    values["head_dim"] = values.get("head_dim") or values["embed"] // values["heads"]
    values["mlp"] = values.get("mlp") or 4 * values["embed"]
    values |= family.fixed
    try:
        values |= family.read(entries, values)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}; dtron does not compute such a {family.kind}") from error
    if values.get("positions", "rotary") == "rotary":
        values["rope"] = _rope(entries, values["context"], where)
        if values["rope"].mscale_all and not values.get("mla.kv_rank"):
            raise UserError(f"{where}: mscale_all_dim is for DeepSeek's attention; leave it out")
    try:
        return build(values)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def build(values: Mapping[str, Any], start: ModelConfig | None = None) -> ModelConfig:
    """Return ``start`` (None: the default) with these fields. ``moe.experts`` is a field of a
    field."""
    m = start or ModelConfig()
    groups: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        group, _, inner = name.rpartition(".")
        groups.setdefault(group, {})[inner] = value
    own = groups.pop("", {})
    parts = {g: replace(own.get(g, getattr(m, g)), **inner) for g, inner in groups.items()}
    return replace(m, **own | parts)


def to_hf(m: ModelConfig, family: Family) -> dict[str, Any]:
    """Return the entries of config.json for this model. Raises UserError if the family cannot
    express one of the fields."""
    entries = {theirs.split("|")[0]: _get(m, ours) for ours, theirs in family.keys.items()}
    entries |= {"model_type": family.kind, "architectures": [family.architecture]}
    entries |= family.demands
    entries |= family.write(m)
    if m.positions == "rotary":
        entries |= _rope_entries(m.rope)
    again = from_hf(entries, family)
    different = _difference(_comparable(again), _comparable(m))
    if different:
        name, theirs, ours = different
        raise UserError(
            f"model.{name}={ours}: a {family.kind} has {theirs}, and no word for any other"
        )
    return entries


def best_family(m: ModelConfig) -> Family:
    """Return the first family that can express this model. Raises UserError if no family can, with
    the reason of each family."""
    reasons = []
    for family in FAMILIES:
        try:
            to_hf(m, family)
            return family
        except ValueError as error:
            reasons.append(str(error))
    raise UserError(f"no family of Hugging Face's has this model: {'; '.join(reasons)}")


def contradiction(flags: ModelConfig, loaded: ModelConfig) -> tuple[str, Any, Any] | None:
    """Return ``(field, in the checkpoint, by flag)`` of the first field that flags may
    not change."""
    return _difference(build({name: _get(flags, name) for name in FREE}, loaded), flags)


def _comparable(m: ModelConfig) -> ModelConfig:
    """Return the model as a config.json can express it. Fields that only matter in training, or
    have no effect in this model, get a fixed value."""
    same = {
        "z_loss": 0.0,
        "init_std": 0.02,
        "vocab_multiple": 1,
        "mtp": MTPConfig(),
        "moe.aux_loss": 0.0,
        "moe.aux_level": "micro_batch",
        "moe.z_loss": 0.0,
        "moe.capacity_factor": 0.0,
        "moe.balanced": False,
        "moe.bias_rate": float(m.moe.bias_rate > 0),
    }
    if m.moe.experts and not m.moe.dense_layers:
        same["mlp"] = 1
    if not m.moe.experts:
        same["moe"] = MoEConfig()
    if m.latent:
        same |= {"kv_heads": 1, "head_dim": 2}
    if set(m.pattern) == {"M"}:
        same["pattern"] = "A"  # the same model
    if m.positions != "rotary":
        same["rope"] = RopeConfig()
    elif m.rope.scaling == "none":
        same["rope"] = RopeConfig(m.rope.theta)
    return build(same, m)


def _difference(a: Any, b: Any, prefix: str = "") -> tuple[str, Any, Any] | None:
    for f in fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if x == y:
            continue
        if is_dataclass(x):
            found = _difference(x, y, f"{prefix}{f.name}.")
            if found:
                return found
        else:
            return prefix + f.name, x, y
    return None


def _get(m: Any, path: str) -> Any:
    for name in path.split("."):
        m = getattr(m, name)
    return m


# dtron's fields of RopeConfig, each with the Hugging Face key, for each RoPE scaling method.
_ROPE_KEYS = {
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
        "truncate": "truncate",
    },
}


def _object(entries: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    found = entries.get(key) or {}
    if not isinstance(found, Mapping):
        raise UserError(f"{where}: {key} is {found!r}, and must be an object; download it again")
    return found


def _rope(entries: Mapping[str, Any], context: int, where: str) -> RopeConfig:
    rope = _object(entries, "rope_parameters", where) or _object(entries, "rope_scaling", where)
    theta = rope.get("rope_theta", entries.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", entries.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(
            f"{where}: rotates part of a head only (partial_rotary_factor); dtron rotates all of it"
        )
    if kind == "default":
        return RopeConfig(float(theta))
    if kind not in _ROPE_KEYS:
        raise UserError(
            f"{where}: rope_type {kind!r} is unknown; dtron has {', '.join(_ROPE_KEYS)}"
        )
    if kind == "yarn" and rope.get("attention_factor") is not None:
        raise UserError(
            f"{where}: yarn with its own attention_factor; dtron computes the paper's factor"
        )
    known = {"original_max_position_embeddings": context, **rope}
    values = {ours: known[theirs] for ours, theirs in _ROPE_KEYS[kind].items() if theirs in known}
    return RopeConfig(float(theta), kind, **values)


def _rope_entries(rope: RopeConfig) -> dict[str, Any]:
    """Return the entries in the format of transformers before version 5. Version 5 reads this
    format too."""
    if rope.scaling == "none":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    names, usual = _ROPE_KEYS[rope.scaling], RopeConfig()
    optional = "mscale", "mscale_all", "truncate"  # left out if they have the default value
    stretched = {
        theirs: getattr(rope, ours)
        for ours, theirs in names.items()
        if ours not in optional or getattr(rope, ours) != getattr(usual, ours)
    }
    return {"rope_theta": rope.theta, "rope_scaling": {"rope_type": rope.scaling, **stretched}}
