"""The RoPE entries of config.json, as transformers understands them.

Two keys have held these entries: ``rope_scaling`` before version 5 of transformers, and
``rope_parameters``. If a config.json has both, ``rope_scaling`` counts. The base ``rope_theta`` is
an entry of this object, or of config.json, or the family's default.

YaRN multiplies cos and sin by one factor. It is ``attention_factor``, if given. If ``mscale`` and
``mscale_all_dim`` are both given, it is the quotient of their two temperatures. Otherwise it is the
paper's ``0.1 ln(factor) + 1``, and a lone ``mscale`` has no effect. DeepSeek's attention also
multiplies its scores by the temperature of ``mscale_all_dim``; the other families do not.

Families differ in what transformers reads there. ``RopeFormat`` says it for a family: whether a
part of a head may be rotated, and whether layers with a window have frequencies of their own.

Left out: ``dynamic`` and ``longrope`` scaling, and scaled frequencies in layers with a window. A
config.json with one of them is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dtron.errors import UserError
from dtron.layers.rope import RopeConfig

# dtron's fields of RopeConfig, each with the Hugging Face key, for each RoPE scaling method.
_KEYS = {
    "linear": {"factor": "factor"},
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
    "linear": ("factor",),
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


@dataclass(frozen=True)
class RopeFormat:
    """The RoPE entries that transformers reads for a family.

    ``latent``: the model has DeepSeek's attention, whose scores have a temperature.
    ``kinds``: the values of ``rope_type``.
    ``partial``: the default of ``partial_rotary_factor``; None: all dims are rotated.
    ``partial_key``: another key for the same, in dims.
    ``window_theta``: the default base in layers with a window, which have entries of their own;
        None: one RoPE for all layers.
    ``window_key``: another key for this base.
    ``optional``: no layer rotates if the base is null."""

    latent: bool = False
    kinds: tuple[str, ...] = ("default", *_KEYS)
    partial: float | None = None
    partial_key: str | None = None
    window_theta: float | None = None
    window_key: str | None = None
    optional: bool = False

    def read(
        self, entries: Mapping[str, Any], fields: Mapping[str, Any], where: str
    ) -> dict[str, Any]:
        """Return the fields of RoPE. Raises UserError for a RoPE that dtron does not compute.

        ``entries``: config.json, with the family's defaults.
        ``fields``: the model's other fields.
        ``where``: the name of config.json in errors."""
        if self.optional and rope_base(entries) is None:
            return {}
        if self.window_theta is None:
            rope = read_rope(entries, fields["context"], where, self)
            return {"rope": replace(rope, partial=self._partial(entries, fields, where))}
        full, window = self._layered(entries, where)
        theta = float(
            window.get("rope_theta", entries.get(self.window_key or "", self.window_theta))
        )
        read = read_rope({**full, "rope_scaling": None}, fields["context"], where, self)
        if window.get("rope_type", window.get("type", "default")) != "default":
            raise UserError(
                f"{where}: RoPE of layers with a window is scaled; dtron scales it in the other "
                "layers alone"
            )
        used = fields["window"] is not None
        return {"rope": read, "window_rope_theta": theta if used else None}

    def _layered(
        self, entries: Mapping[str, Any], where: str
    ) -> tuple[dict[str, Any], Mapping[str, Any]]:
        """Return entries with the RoPE of layers without a window, and the RoPE of the others."""
        given = object_of(entries, "rope_parameters", where)
        scaling = object_of(entries, "rope_scaling", where)
        kinds = ("full_attention", "sliding_attention")
        if not set(given) <= set(kinds) or (given and scaling and not given.get(kinds[0])):
            raise UserError(
                f"{where}: rope_parameters has {', '.join(map(str, given))}; dtron reads one "
                f"object for each of {' and '.join(kinds)}"
            )
        full, window = (object_of(given, kind, where) for kind in kinds)
        full = {**({} if given else {"rope_type": "default"}), **full, **scaling}
        full.pop("truncate", None)  # transformers reads it outside of the layers' objects alone
        whole = {"rope_theta": entries["rope_theta"], "rope_parameters": full}
        return whole | {k: entries[k] for k in ("partial_rotary_factor",) if k in entries}, window

    def _partial(self, entries: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> float:
        """Return the share of a head's dims that is rotated."""
        if self.partial is None:
            return 1.0
        dims = entries.get(self.partial_key) if self.partial_key else None
        usual = self.partial if dims is None else dims / fields["head_dim"]
        rope = _object(entries, where)
        share = rope.get("partial_rotary_factor", entries.get("partial_rotary_factor", usual))
        return 1.0 if share is None else float(share)

    def write(self, m: Any) -> dict[str, Any]:
        """Return the entries of the model ``m``. Without layers that differ, they are in the format
        of transformers before version 5. Version 5 reads this format too."""
        entries = rope_entries(m.rope)
        if self.partial is not None:
            entries["partial_rotary_factor"] = m.rope.partial
        if self.window_theta is None:
            return entries
        full = {"rope_theta": m.rope.theta, **(entries.pop("rope_scaling") or {})}
        theta = m.rope.theta if m.window_rope_theta is None else m.window_rope_theta
        window = {"rope_type": "default", "rope_theta": theta}
        layered = {"full_attention": {"rope_type": "default", **full}, "sliding_attention": window}
        own = {} if self.window_key is None else {self.window_key: theta}
        return entries | own | {"rope_scaling": None, "rope_parameters": layered}


def rope_base(entries: Mapping[str, Any]) -> Any:
    """Return the base of one RoPE for all layers, as config.json has it."""
    rope = entries.get("rope_scaling") or entries.get("rope_parameters") or {}
    return rope.get("rope_theta", entries["rope_theta"])


def _object(entries: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    return object_of(entries, "rope_scaling", where) or object_of(entries, "rope_parameters", where)


def read_rope(entries: Mapping[str, Any], context: int, where: str, form: RopeFormat) -> RopeConfig:
    """Return the RoPE of a config.json, as if whole heads were rotated. Raises UserError for one
    that dtron does not compute.

    ``entries``: config.json, with the family's defaults.
    ``context``: the model's context in tokens, the default of the original context.
    ``where``: the name of config.json in errors."""
    rope = _object(entries, where)
    layered = [key for key, value in rope.items() if isinstance(value, Mapping)]
    if layered:
        raise UserError(
            f"{where}: RoPE differs between layers ({', '.join(layered)}); this family has one "
            "RoPE for all layers"
        )
    theta = float(rope_base(entries))
    share = rope.get("partial_rotary_factor", entries.get("partial_rotary_factor"))
    if form.partial is None and share not in (None, 1.0):
        raise UserError(
            f"{where}: rotates part of a head only (partial_rotary_factor); this family rotates "
            "all of it"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in form.kinds:
        raise UserError(
            f"{where}: rope_type {kind!r} is unknown; dtron has {', '.join(form.kinds)}"
        )
    if kind == "default":
        return RopeConfig(theta)
    lacking = [key for key in _REQUIRED[kind] if key not in rope]
    if lacking:
        raise UserError(f"{where}: rope_type {kind!r} lacks {', '.join(lacking)}; add it")
    original = entries.get("original_max_position_embeddings")
    if original is None:
        original = rope.get("original_max_position_embeddings", context)
    known = {**rope, "original_max_position_embeddings": original}
    if kind == "yarn":
        known = _yarn(known, context, form.latent)
    elif form.latent and rope.get("mscale_all_dim"):
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
