"""The width of a model: the same model at another width, and what muP (mup.py) changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dtron.errors import UserError
from dtron.model.config import ModelConfig
from dtron.model.transformer import declare_model
from dtron.params import WeightSpec, normal, residual_out
from dtron.tree import flat


def at_width(m: ModelConfig, embed: int) -> ModelConfig:
    """Return the model with ``embed`` as its width. All widths change by the same factor. The
    number of heads changes too, or head_dim in its place if ``m`` says that head_dim grows
    (``mup_base_head_dim``).

    Raises UserError if a width is no whole number then."""

    def scaled(name: str, size: int) -> int:
        if size * embed % m.embed:
            raise UserError(
                f"width {embed}: model.{name}={size} at model.embed={m.embed} would be "
                f"{size * embed / m.embed:g}; choose another width, or another model.{name}"
            )
        return size * embed // m.embed

    if m.mup_base_head_dim and m.latent:
        raise UserError(
            f"model.mup_base_head_dim={m.mup_base_head_dim} with latent attention: its head has "
            "three widths, and only the number of heads is changed here; use 0"
        )
    names = ["mlp", *(name for mixer in m.mixers for name in mixer.widths)]
    names += ("moe.mlp", "moe.shared") if m.moe.experts else ()
    if m.mup_base_head_dim:
        names = [name for name in names if name not in ("heads", "kv_heads")] + ["head_dim"]
    changes: dict[str, dict[str, Any]] = {}  # of the model, and of the configs in it
    for name in dict.fromkeys(names):
        part, _, field = name.rpartition(".")
        config = getattr(m, part) if part else m
        changes.setdefault(part, {})[field] = scaled(name, getattr(config, field))
    own = changes.pop("")
    nested: Any = {part: replace(getattr(m, part), **new) for part, new in changes.items()}
    return replace(m, embed=embed, **own, **nested)


def describe_mup(m: ModelConfig) -> list[str]:
    """Return a line for each factor of initial values in muP, and a line about logits and attention
    scores. In the standard parametrization there is no line."""
    if not m.mup:
        return []
    kinds: dict[float, list[WeightSpec]] = {}
    for w in flat(declare_model(m)):
        if w.init in (normal, residual_out):  # the others have no such factor
            kinds.setdefault(w.growth.init_std, []).append(w)
    scores = ", ".join(
        f"{x.params.segment} scores {x.score_growth:g}x" for x in m.mixers if x.has_logits
    )
    return [
        *(
            f"initial std {m.init_std * factor:g} ({factor:g}x): {len(weights)} weights, first "
            f"{weights[0].path}"
            for factor, weights in kinds.items()
        ),
        f"width {m.width:g}x of {m.mup_base_width}: logits {1 / m.width:g}x, {scores}",
    ]
