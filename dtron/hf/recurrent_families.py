"""The model families of Hugging Face whose layers have a recurrent state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dtron.errors import UserError
from dtron.hf import recurrent_config as config
from dtron.hf import recurrent_tables as recurrent
from dtron.hf import weight_tables as tables
from dtron.hf.family import Family
from dtron.hf.rope_config import RopeFormat, rope_base
from dtron.model.config import ModelConfig

_IGNORED = (r".*\.rotary_emb\.inv_freq", r"mtp\..*")
_IMAGES = (r"model\.visual\..*",)
_IN_CONTAINER = ((r"^model\.language_model\.", "model."),)

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


def _read_qwen3_5(entries: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Every 4th layer has full attention, if nothing else is said."""
    layers, types = fields["layers"], entries["layer_types"]
    if types is None:
        every, names = entries["full_attention_interval"], list(_QWEN3_NEXT)
        types = [names[(i + 1) % every == 0] for i in range(layers)]
    return {"pattern": _letters(types, layers, _QWEN3_NEXT)}


def _write_qwen3_5(m: ModelConfig) -> dict[str, Any]:
    return {"layer_types": _types(m, {letter: kind for kind, letter in _QWEN3_NEXT.items()})}


def _read_qwen3_next(entries: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Every layer has experts, if nothing else is said."""
    dense, step = entries["mlp_only_layers"] or [], entries["decoder_sparse_step"]
    sparse = [i not in dense and (i + 1) % step == 0 for i in range(fields["layers"])]
    kinds = "".join("DF"[one] for one in sparse)
    return _read_qwen3_5(entries, fields) | {"feed_forwards": kinds}


def _write_qwen3_next(m: ModelConfig) -> dict[str, Any]:
    return _write_qwen3_5(m) | {
        "mlp_only_layers": [i for i in range(m.layers) if m.dense(i)] if m.moe.experts else [],
        "decoder_sparse_step": 1,
    }


def _read_olmo_hybrid(entries: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Every 4th layer has full attention, or the last one, if nothing else is said. Attention does
    not rotate if the base of the angles is null. Missing sizes follow from other sizes."""
    layers, types, full = fields["layers"], entries["layer_types"], "full_attention"
    if types is None:
        types = [list(_QWEN3_NEXT)[(i + 1) % 4 == 0] for i in range(layers)]
        types = types if full in types else [*types[:-1], full]
    attention = "N" if rope_base(entries) is None else "A"
    pattern = _letters(types, layers, _QWEN3_NEXT | {full: attention})
    if set(pattern) != {"L", attention}:
        raise UserError(f"layer_types has {', '.join(sorted(set(types)))} alone")
    sizes = {name.removeprefix("delta."): fields[name] for name in config.DELTA_SIZES}
    key_heads = sizes["key_heads"] or fields["heads"]
    key_dim = sizes["key_dim"] or int(0.75 * fields["embed"] / key_heads)
    return {
        "pattern": pattern,
        "post_norm_mixers": attention,
        "delta.key_heads": key_heads,
        "delta.value_heads": sizes["value_heads"] or fields["heads"],
        "delta.key_dim": key_dim,
        "delta.value_dim": sizes["value_dim"] or 2 * key_dim,
    }


def _write_olmo_hybrid(m: ModelConfig) -> dict[str, Any]:
    rotates = {} if "A" in m.pattern else {"rope_theta": None, "rope_scaling": None}
    names = {"L": "linear_attention", "A": "full_attention", "N": "full_attention"}
    return {"layer_types": _types(m, names)} | rotates


# The letters of dtron's mixer and feed-forward layer, of each type of a block of Nemotron-H.
_NEMOTRON_H = {"linear_attention": "S_", "full_attention": "N_", "mlp": "_D"}
_NEMOTRON_H_LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}


def _read_nemotron_h(entries: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The list of types has the number of layers, whatever num_hidden_layers is."""
    types = entries["layers_block_type"] or entries["layer_types"]
    if types is None:
        written = entries["hybrid_override_pattern"] or "ME*-"
        types = [_NEMOTRON_H_LETTERS.get(letter, letter) for letter in written]
    both = [_letters(types, len(types), {t: x[i] for t, x in _NEMOTRON_H.items()}) for i in (0, 1)]
    return {"layers": len(types), "pattern": both[0], "feed_forwards": both[1]}


def _write_nemotron_h(m: ModelConfig) -> dict[str, Any]:
    letters = {x[0]: kind for kind, x in _NEMOTRON_H.items()}
    return {"layers_block_type": _types(m, letters)}


_KIMI = {"linear_attention": "K", "full_attention": "P"}
_KIMI_MLP = {"dense": "D", "sparse": "F"}


def _read_kimi_linear(entries: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The published config.json has sizes and layers of its recurrent layers in an object of its
    own. It numbers layers from 1."""
    layers, own = fields["layers"], entries["linear_attn_config"] or {}
    types, mlps = entries["layer_types"], entries["mlp_layer_types"]
    if types is None and "full_attn_layers" in own and "kda_layers" in own:
        found = dict.fromkeys(own["kda_layers"], "linear_attention")
        found |= dict.fromkeys(own["full_attn_layers"], "full_attention")
        types = [found.get(i + 1, "no type for a layer") for i in range(layers)]
    elif types is None:
        types = [list(_KIMI)[i > 0 and i % 4 == 0] for i in range(layers)]
    if mlps is None:
        mlps = [list(_KIMI_MLP)[i >= entries["first_k_dense_replace"]] for i in range(layers)]
    heads = own.get("num_heads", fields["delta.key_heads"])
    width = own.get("head_dim", fields["delta.key_dim"])
    shared = entries["num_shared_experts"]
    if "n_shared_experts" in entries:
        shared = entries["n_shared_experts"]
    return {
        "mla.q_rank": fields["mla.q_rank"] or 0,
        "moe.shared": fields["moe.mlp"] * shared,
        "moe.groups": fields["moe.groups"] or 1,
        "moe.group_top_k": fields["moe.group_top_k"] or 1,
        "delta.key_heads": heads,
        "delta.value_heads": heads,
        "delta.key_dim": width,
        "delta.value_dim": width,
        "delta.taps": own.get("short_conv_kernel_size", fields["delta.taps"]),
        "pattern": _letters(types, layers, _KIMI),
        "feed_forwards": _letters(mlps, layers, _KIMI_MLP),
    }


def _write_kimi_linear(m: ModelConfig) -> dict[str, Any]:
    return {
        "layer_types": _types(m, {letter: kind for kind, letter in _KIMI.items()}),
        "mlp_layer_types": [list(_KIMI_MLP)[m.sparse(i)] for i in range(m.layers)],
        "num_shared_experts": m.moe.shared // m.moe.mlp,
        "q_lora_rank": m.mla.q_rank or None,
        "num_key_value_heads": m.heads,
    }


# ---------------------------------------------------------------------------- families

_ATTENTION = {path: row for path, row in tables.ATTENTION.items() if "norm" not in path}
_QWEN3_NEXT_NORMED = tables.zero_centered(tables.ENDS | tables.NORMS | tables.GATED_ATTENTION)
_QWEN3_NEXT_FIXED = {"qk_norm": True, "attention_gate": True}
_QWEN3_NEXT_DEMANDS = {"hidden_act": "silu", "attention_bias": False}

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
        fixed=_QWEN3_NEXT_FIXED | {"moe.shared_gate": True},
        demands=_QWEN3_NEXT_DEMANDS,
        stacked=tables.STACKED_EXPERTS,
        ignored=_IGNORED,
        rope=RopeFormat(partial=0.25),
        read=_read_qwen3_next,
        write=_write_qwen3_next,
    ),
    Family(
        "qwen3_5_text",
        "Qwen3_5ForCausalLM",
        container="qwen3_5",
        weights=_QWEN3_NEXT_NORMED | recurrent.QWEN3_5_DELTA_NET | tables.MLP,
        keys=config.QWEN3_5_KEYS,
        defaults=config.QWEN3_5,
        fixed=_QWEN3_NEXT_FIXED,
        demands=_QWEN3_NEXT_DEMANDS,
        ignored=_IGNORED + _IMAGES,
        rope=RopeFormat(partial=0.25),
        renamed=_IN_CONTAINER,
        read=_read_qwen3_5,
        write=_write_qwen3_5,
    ),
    Family(
        "qwen3_5_moe_text",
        "Qwen3_5MoeForCausalLM",
        container="qwen3_5_moe",
        weights=_QWEN3_NEXT_NORMED
        | recurrent.QWEN3_5_DELTA_NET
        | tables.EXPERTS
        | tables.SHARED_EXPERT,
        keys=config.QWEN3_5_MOE_KEYS,
        defaults=config.QWEN3_5_MOE,
        fixed=_QWEN3_NEXT_FIXED | {"moe.shared_gate": True},
        demands=_QWEN3_NEXT_DEMANDS,
        stacked=tables.STACKED_EXPERTS,
        ignored=_IGNORED + _IMAGES,
        rope=RopeFormat(partial=0.25),
        renamed=_IN_CONTAINER,
        read=_read_qwen3_5,
        write=_write_qwen3_5,
    ),
    Family(
        "olmo_hybrid",
        "OlmoHybridForCausalLM",
        weights=tables.ENDS | _ATTENTION | tables.MLP | recurrent.OLMO_HYBRID_BLOCK,
        keys=config.OLMO_HYBRID_KEYS,
        defaults=config.OLMO_HYBRID,
        fixed={"qk_norm": True, "qk_norm_over": "projection", "delta.norm_eps": 1e-5},
        demands=_QWEN3_NEXT_DEMANDS,
        stacked=recurrent.OLMO_HYBRID_STACKED,
        rope=RopeFormat(optional=True),
        renamed=(
            (r"\.input_layernorm\.", ".attention_layer_norm."),
            (r"\.post_attention_layernorm\.", ".feedforward_layer_norm."),
        ),
        read=_read_olmo_hybrid,
        write=_write_olmo_hybrid,
    ),
    Family(
        "nemotron_h",
        "NemotronHForCausalLM",
        weights=recurrent.NEMOTRON_H_ENDS | recurrent.NEMOTRON_H_BLOCK,
        keys=config.NEMOTRON_H_KEYS,
        defaults=config.NEMOTRON_H,
        fixed={"activation": "relu2"},
        demands={
            "mlp_hidden_act": "relu2",
            "mamba_hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "use_bias": False,
            "use_conv_bias": True,
        },
        ignored=_IGNORED,
        prefix="backbone.",
        renamed=((r"^model\.", "backbone."),),
        read=_read_nemotron_h,
        write=_write_nemotron_h,
    ),
    Family(
        "kimi_linear",
        "KimiLinearForCausalLM",
        weights=tables.ENDS | tables.NORMS | tables.MLP | recurrent.KIMI_BLOCK,
        keys=config.KIMI_LINEAR_KEYS,
        defaults=config.KIMI_LINEAR,
        # transformers never ties the head.
        fixed={"moe.score": "sigmoid", "moe.bias_rate": 0.001, "tied": False},
        demands={"hidden_act": "silu", "attention_bias": False},
        stacked=recurrent.KIMI_STACKED,
        renamed=((r"\.block_sparse_moe\.(gate|up|down)_proj\.", r".mlp.\1_proj."),),
        read=_read_kimi_linear,
        write=_write_kimi_linear,
    ),
)
