"""The checks of a model's config: sizes, names, and fields that contradict each other. config.py
has the fields. A mixer checks its own fields (``Mixer.check_model``), and the checks against a mesh
are in runtime/validate.py."""

from __future__ import annotations

from typing import Any

from dtron.bounds import under
from dtron.errors import UserError

# A tree has a node for each layer, so more layers would take minutes before anything runs.
LARGEST = {"layers": 10_000}


def check_model(m: Any) -> None:
    """Raise UserError for the first field that does not fit the others.

    ``m``: a ``ModelConfig``."""
    for name in (
        "vocab",
        "embed",
        "layers",
        "heads",
        "kv_heads",
        "head_dim",
        "mlp",
        "context",
        "vocab_multiple",
    ):
        high = LARGEST.get(name, 1 << 31)
        if not 1 <= getattr(m, name) <= high:
            raise UserError(
                f"model.{name}={getattr(m, name)}: a size is from 1 to {high}; change it"
            )
    if not m.pattern or not set(m.pattern) <= set(m.kinds):
        raise UserError(
            f"model.pattern={m.pattern!r}: must be one or more of the letters "
            f"{', '.join(m.kinds)}; change it"
        )
    _check_feed_forwards(m)
    for mixer in m.mixers:
        mixer.check_model()
    under(m, "model", {name: float("inf") for name in ("init_std", "z_loss", "norm_eps")})
    for name in ("window", "softcap", "attention_scale", "final_softcap"):
        if getattr(m, name) is not None and not 0 < getattr(m, name) < float("inf"):
            raise UserError(
                f"model.{name}={getattr(m, name)}: must be positive; or None to turn it off"
            )
    for name in ("embedding_scale", "residual_scale", "logit_scale"):
        if not 0 < getattr(m, name) < float("inf"):
            raise UserError(f"model.{name}={getattr(m, name)}: must be positive; 1: none")
    theta = m.window_rope_theta
    if theta is not None and not 1 < theta < float("inf"):
        raise UserError(f"model.window_rope_theta={theta}: must be over 1; raise it")
    if theta is not None and m.window is None:
        raise UserError(
            f"model.window_rope_theta={theta}: no layer has a window; give --model.window too"
        )
    if m.qk_norm_over == "projection" and not (m.qk_norm and m.norm == "rmsnorm"):
        raise UserError(
            f"model.qk_norm_over=projection with model.norm={m.norm} and model.qk_norm="
            f"{m.qk_norm}: all heads together have an RMSNorm; give --model.qk-norm and "
            "--model.norm rmsnorm, or use --model.qk-norm-over head"
        )
    letters = {m.letter(i) for i in m.blocks}
    if not set(m.post_norm_mixers) <= letters:
        raise UserError(
            f"model.post_norm_mixers={m.post_norm_mixers}: the blocks have the mixers "
            f"{', '.join(sorted(letters))}; use some of these letters, or none"
        )
    if m.qk_norm_over == "rotated" and not (m.qk_norm and m.positions == "rotary"):
        raise UserError(
            f"model.qk_norm_over=rotated with model.positions={m.positions} and model.qk_norm="
            f"{m.qk_norm}: heads are normalised after a rotation; give --model.qk-norm and "
            "--model.positions rotary, or use --model.qk-norm-over head"
        )
    if not 0 <= m.attention_temperature < float("inf") or m.attention_temperature_floor < 1:
        raise UserError(
            f"model.attention_temperature={m.attention_temperature}, "
            f"model.attention_temperature_floor={m.attention_temperature_floor}: must be from 0, "
            "and from 1; change them"
        )
    if m.attention_temperature and "N" not in letters:
        raise UserError(
            f"model.attention_temperature={m.attention_temperature} with model.pattern={m.pattern}:"
            " it is of attention without positions; use 0, or a pattern with N"
        )
    _check_mup(m)
    if m.full_every < 0:
        raise UserError(f"model.full_every={m.full_every}: a number of layers; use 0 for none")
    if m.moe.experts and not any(map(m.sparse, range(m.layers))):
        raise UserError(
            f"model.moe.dense_layers={m.moe.dense_layers} of model.layers={m.layers} with "
            f"model.feed_forwards={m.feed_forwards}: no layer would have experts; use fewer, or "
            "--model.moe.experts 0"
        )


def _check_feed_forwards(m: Any) -> None:
    if not m.feed_forwards or not set(m.feed_forwards) <= set("FD_"):
        raise UserError(
            f"model.feed_forwards={m.feed_forwards!r}: must be one or more of the letters F, D, _; "
            "change it"
        )
    for i in m.blocks:
        if not (m.mixer(m.letter(i)).present or m.sparse(i) or m.dense(i)):
            raise UserError(
                f"model.pattern={m.pattern} with model.feed_forwards={m.feed_forwards}: block {i} "
                "has neither a mixer nor a feed-forward layer; change a letter"
            )
    if not any(mixer.present for mixer in m.mixers):
        raise UserError(f"model.pattern={m.pattern}: no block has a mixer; change a letter")


def _check_mup(m: Any) -> None:
    for name in ("mup_base_width", "mup_base_head_dim"):
        if not 0 <= getattr(m, name) < 1 << 31:
            raise UserError(
                f"model.{name}={getattr(m, name)}: a width of the base model, or 0 for "
                "none; change it"
            )
    if m.mup_base_head_dim and m.qk_norm_over == "rotated":
        raise UserError(
            f"model.mup_base_head_dim={m.mup_base_head_dim} with model.qk_norm_over=rotated: "
            "queries have no weight that could have muP's factor; use 0"
        )
    if m.mup_base_head_dim and not m.mup:
        raise UserError(
            f"model.mup_base_head_dim={m.mup_base_head_dim} with model.mup_base_width=0, "
            "which is the standard parametrization; give --model.mup-base-width too"
        )
