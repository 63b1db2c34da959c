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
from dtron.hf.dequantize import METHODS
from dtron.hf.families import FAMILIES
from dtron.hf.family import Family
from dtron.hf.rope_config import explicit, object_of
from dtron.json_files import is_there, read_object
from dtron.layers.gated_delta_net import DeltaNetConfig
from dtron.layers.lightning_indexer import IndexerConfig
from dtron.layers.mamba2 import Mamba2Config
from dtron.layers.rope import RopeConfig
from dtron.model.check_model import LARGEST
from dtron.model.config import ModelConfig
from dtron.model.mtp import MTPConfig
from dtron.moe.config import MoEConfig

CONFIG = "config.json"

# Fields of a loaded model that a flag may change: training options, context, window and RoPE.
FREE = (
    "context",
    "window",
    "window_rope_theta",
    "rope",
    "z_loss",
    "init_std",
    "vocab_multiple",
    "mtp",
    "indexer.loss",
    "indexer.warmup",
    "moe.aux_loss",
    "moe.aux_level",
    "moe.z_loss",
    "moe.bias_rate",
    "moe.capacity_factor",
    "delta.chunk",
    "mamba.chunk",
)


def read_config(folder: Path) -> tuple[Family, ModelConfig]:
    """Return the family and the model of a folder. Raises UserError for an architecture that dtron
    does not have, and for an option of an architecture that dtron does not compute."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: is no folder; give a model's folder, with config.json and safetensors"
        )
    path = folder / CONFIG
    if not is_there(path):
        raise UserError(f"{folder}: has no {CONFIG}; give the folder of a model from Hugging Face")
    entries = text_entries(read_object(path), str(path))
    family = family_of(entries, str(path))
    return family, from_hf(entries, family, str(path))


def text_entries(entries: Mapping[str, Any], where: str = CONFIG) -> Mapping[str, Any]:
    """Return the entries of the text model. A folder with images too has them in ``text_config``;
    transformers takes them for the text model alone."""
    kind = entries.get("model_type")
    family = next((f for f in FAMILIES if f.container and f.container == kind), None)
    if family is None:
        return entries
    own = {"model_type": family.kind, "architectures": [family.architecture]}
    outer = {key: entries[key] for key in ("quantization_config", "dtype") if key in entries}
    return {**outer, **object_of(entries, "text_config", where), **own}


def family_of(entries: Mapping[str, Any], where: str = CONFIG) -> Family:
    names = entries.get("architectures") or []
    if not isinstance(names, list):
        raise UserError(
            f"{where}: architectures is {names!r}, and must be a list of names; write one, like "
            '["LlamaForCausalLM"]'
        )
    for family in FAMILIES:
        kinds = (family.kind, *family.aliases)
        if family.architecture in names or (not names and entries.get("model_type") in kinds):
            return family
    what = ", ".join(map(str, names)) or entries.get("model_type") or "none"
    known = ", ".join(f.kind for f in FAMILIES)
    raise UserError(f"{where}: architecture {what} is unknown; dtron has the families {known}")


def from_hf(entries: Mapping[str, Any], family: Family, where: str = CONFIG) -> ModelConfig:
    """Return the model that a config.json describes, as transformers understands it: a missing key
    has the family's default. Raises UserError for an option that dtron does not compute."""
    try:
        return _model(with_defaults(entries, family, where), family, where)
    except (TypeError, ArithmeticError, AttributeError) as error:
        raise UserError(
            f"{where}: a value has another type than it must have ({error}); mend the value"
        ) from error


def with_defaults(entries: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    """Return the entries with the family's default of each missing key. A key with several names
    gets its first name."""
    out = {**family.defaults, **entries}
    for theirs in family.keys.values():
        name, *others = theirs.split("|")
        given = {n: entries[n] for n in (name, *others) if n in entries}
        if given:
            if any(value != next(iter(given.values())) for value in given.values()):
                said = ", ".join(f"{n} is {value!r}" for n, value in given.items())
                raise UserError(f"{where}: {said}: two names of one value; keep one of them")
            out[name] = next(iter(given.values()))
    if out.get("rope_parameters") is None:
        out["rope_parameters"] = family.defaults.get("rope_parameters")
    return out


def _model(entries: Mapping[str, Any], family: Family, where: str) -> ModelConfig:
    """Return the model of entries that have all defaults."""
    if entries.get("quantization_config"):
        method = object_of(entries, "quantization_config", where).get("quant_method")
        if method not in METHODS:
            raise UserError(
                f"{where}: weights are quantised by {method}; dtron reads {', '.join(METHODS)} and "
                "weights that are not quantised"
            )
    for key, only in family.demands.items():
        value = entries.get(key, only)
        if value != only and not (value is None and not only):  # null is false, and an empty list
            raise UserError(
                f"{where}: {key} is {value!r}, and dtron computes {family.kind} with {only!r}"
            )
    values: dict[str, Any] = {
        ours: entries[theirs.split("|")[0]] for ours, theirs in family.keys.items()
    }
    for ours, value in values.items():
        if isinstance(value, int) and abs(value) >= 1 << 63:
            raise UserError(
                f"{where}: {family.keys[ours]} has more than 63 bits; no model has such a number"
            )
    values["kv_heads"] = values.get("kv_heads") or values["heads"]
    values["head_dim"] = values.get("head_dim") or values["embed"] // values["heads"]
    values["mlp"] = values.get("mlp") or 4 * values["embed"]
    values |= family.fixed
    if values["layers"] > LARGEST["layers"]:  # families list the kind of each layer
        raise UserError(
            f"{where}: has {values['layers']} layers, and a model has at most {LARGEST['layers']}"
        )
    try:
        values |= family.read(entries, values)
        if values.get("positions", "rotary") == "rotary":
            values |= family.rope.read(entries, values, where)
    except (KeyError, TypeError, ValueError) as error:
        said = str(error).removeprefix(f"{where}: ")
        raise UserError(f"{where}: {said}; dtron does not compute such a {family.kind}") from error
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
    if m.positions == "rotary":
        entries |= family.rope.write(m)
    entries |= family.write(m)
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
    not change. The vocabulary may grow."""
    if flags.vocab < loaded.vocab:
        return "vocab", loaded.vocab, flags.vocab
    free = {name: _get(flags, name) for name in ("vocab", *FREE)}
    return _difference(build(free, loaded), flags)


def _comparable(m: ModelConfig) -> ModelConfig:
    """Return the model as a config.json can express it. Fields that only matter in training, or
    have no effect in this model, get a fixed value."""
    same = {
        "z_loss": 0.0,
        "init_std": 0.02,
        "mup_base_width": 0,  # an export puts the factors of muP into weights
        "mup_base_head_dim": 0,
        "vocab_multiple": 1,
        "mtp": MTPConfig(),
        "indexer.loss": IndexerConfig().loss,
        "indexer.warmup": False,
        "moe.aux_loss": 0.0,
        "moe.aux_level": "micro_batch",
        "moe.z_loss": 0.0,
        "moe.capacity_factor": 0.0,
        "moe.balanced": False,
        "moe.bias_rate": float(m.moe.bias_rate > 0),
    }
    if not any(map(m.dense, range(m.layers))):
        same["mlp"] = 1
    if not m.moe.experts:
        same["moe"] = MoEConfig()
    if not any(mixer.chooses for mixer in m.mixers):
        same["indexer"] = IndexerConfig()
    if m.latent:
        same |= {"kv_heads": 1, "head_dim": 2}
    elif m.attention_scale is None:
        same["attention_scale"] = m.head_dim**-0.5
    kinds = ("F" if m.sparse(i) else "D" if m.dense(i) else "_" for i in range(m.layers))
    same["pattern"] = "".join(m.letter(i) for i in range(m.layers))
    same |= {"feed_forwards": "".join(kinds), "moe.dense_layers": 0}
    used = {name.rpartition(".")[0] for mixer in m.mixers for name in mixer.widths}
    for name, unused in (("delta", DeltaNetConfig()), ("mamba", Mamba2Config())):
        own = getattr(m, name) if name in used else unused
        same[name] = replace(own, chunk=unused.chunk)
    if "delta" in used and m.delta.norm_eps is None:
        same["delta.norm_eps"] = m.norm_eps
    if set(m.post_norm_mixers) == {*map(m.letter, range(m.layers))}:
        same |= {"norm_position": "post", "post_norm_mixers": ""}
    if not m.qk_norm:
        same["qk_norm_over"] = "head"
    if m.window is None or m.full_every > m.layers:
        same["full_every"] = 0
    if m.window is None:
        same["window_kind"] = "sliding"
    if not m.attention_temperature:
        same["attention_temperature_floor"] = 8192
    if m.positions != "rotary" or m.window is None:
        same["window_rope_theta"] = None
    elif m.window_rope_theta is None and m.rope.scaling == "none":
        same["window_rope_theta"] = m.rope.theta
    if m.positions != "rotary":
        same["rope"] = RopeConfig()
    elif m.rope.scaling == "none":
        same["rope"] = RopeConfig(m.rope.theta, partial=m.rope.partial)
    elif m.rope.scaling == "linear":
        same["rope"] = RopeConfig(m.rope.theta, "linear", m.rope.factor, partial=m.rope.partial)
    else:
        same["rope"] = explicit(m.rope)
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
