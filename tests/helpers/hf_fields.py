"""Random fields of a config.json: a function for each model family, over all fields that
transformers reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

LAYERS = 3
_SIZES = {"vocab_size": 61, "bos_token_id": None, "eos_token_id": None}
_KINDS = ("sliding_attention", "full_attention")
_OFTEN = 8  # a field that dtron refuses is drawn once in as many times


def rare(usual: Any, other: Any) -> st.SearchStrategy:
    return st.sampled_from([usual] * _OFTEN + [other])


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high).map(lambda x: round(x, 3))


def optional(**fields: st.SearchStrategy) -> st.SearchStrategy[dict[str, Any]]:
    """Any of the fields, each with a value or left out."""
    return st.fixed_dictionaries({}, optional=fields)


ROPE_TYPES = ("default", "llama3", "yarn", "yarn", "yarn", "linear")


def rope(draw: Any, kinds: Sequence[str] = ROPE_TYPES) -> dict[str, Any]:
    """The object of rope_parameters or rope_scaling."""
    kind = draw(st.sampled_from(kinds))
    name = draw(rare("rope_type", "type"))
    out: dict[str, Any] = {name: kind} | draw(optional(rope_theta=numbers(50, 1000)))
    if kind == "default":
        return out
    if kind == "longrope":  # for a head of 16 dims
        return out | {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    out["factor"] = draw(numbers(1.5, 8))
    if draw(st.booleans()) or kind == "llama3":
        out["original_max_position_embeddings"] = draw(st.sampled_from([16, 32, 64]))
    if kind == "llama3":
        return out | {"low_freq_factor": 1.0, "high_freq_factor": draw(numbers(2, 8))}
    if kind == "yarn":
        out |= draw(
            optional(
                beta_fast=st.sampled_from([None, 2.0, 8.0]),
                beta_slow=st.sampled_from([None, 0.5, 1.0]),
                mscale=st.sampled_from([0, 0.5, 0.707, 1.0, 2.0]),
                mscale_all_dim=st.sampled_from([0, 0.5, 0.707, 1.0]),
                truncate=st.booleans(),
                attention_factor=st.sampled_from([None, 0.8, 1.3]),
            )
        )
    return out


def dense(draw: Any, **more: st.SearchStrategy) -> dict[str, Any]:
    heads = draw(st.sampled_from([2, 4]))
    return {
        **_SIZES,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([1, 2, heads])),
        "head_dim": draw(st.sampled_from([8, 16])),
        "max_position_embeddings": draw(st.sampled_from([64, 128])),
        **draw(
            optional(
                rms_norm_eps=st.sampled_from([1e-6, 1e-5, 1e-3]),
                tie_word_embeddings=st.booleans(),
                hidden_act=rare("silu", "gelu"),
                **more,
            )
        ),
    }


_WINDOW = st.sampled_from([None, 3, 20, 50])
_QWEN = {
    "use_sliding_window": st.booleans(),
    "sliding_window": _WINDOW,
    "max_window_layers": st.sampled_from([0, 1, LAYERS]),
}
_TYPES = st.sampled_from([None, list(_KINDS) + [_KINDS[0]], [_KINDS[1]] * 3, [_KINDS[0]] * 3])
_EXPERTS = {"num_experts_per_tok": st.sampled_from([1, 2, 3])}
_CAPPED = ("attn", "final")
_GEMMA = {
    "query_pre_attn_scalar": st.sampled_from([60, 100]),
    "sliding_window": st.sampled_from([3, 20]),
    "layer_types": _TYPES,
    "attention_bias": rare(False, True),
    "hidden_activation": rare("gelu_pytorch_tanh", "silu"),
}
PHI3_ROPE = ("default", "default", "longrope")  # transformers refuses the others
LAYERED_ROPE = ("Olmo3", "Gemma3Text")
PARTIAL = ("Phi3", "Glm4Moe", "MiniMaxM2", "Qwen3Next", "Qwen3_5Text", "Qwen3_5MoeText")
BIAS = {"attention_bias": rare(False, True)}


def llama(draw: Any) -> dict[str, Any]:
    return dense(draw, **BIAS, mlp_bias=rare(False, True))


def mistral(draw: Any) -> dict[str, Any]:
    return dense(draw, sliding_window=_WINDOW)


def qwen2(draw: Any) -> dict[str, Any]:
    return dense(draw, **_QWEN, layer_types=_TYPES)


def qwen3(draw: Any) -> dict[str, Any]:
    return dense(draw, **_QWEN, **BIAS, layer_types=_TYPES)


def gpt2(draw: Any) -> dict[str, Any]:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": draw(st.sampled_from([2, 4]))}
    return {
        **_SIZES,
        **sizes,
        **draw(
            optional(
                n_positions=st.just(128),
                n_inner=st.sampled_from([None, 48]),
                layer_norm_epsilon=st.sampled_from([1e-5, 1e-3]),
                tie_word_embeddings=st.booleans(),
                activation_function=rare("gelu_new", "relu"),
                scale_attn_weights=rare(True, False),
                scale_attn_by_inverse_layer_idx=rare(False, True),
            )
        ),
    }


def mixtral(draw: Any) -> dict[str, Any]:
    return dense(draw, **_EXPERTS, sliding_window=_WINDOW) | {"num_local_experts": 4}


def qwen3_moe(draw: Any) -> dict[str, Any]:
    more = {key: value for key, value in _QWEN.items() if key != "max_window_layers"}
    made = dense(
        draw,
        **_EXPERTS,
        **BIAS,
        **more,
        norm_topk_prob=st.booleans(),
        decoder_sparse_step=rare(1, 2),
        mlp_only_layers=rare([], [0]),
    )
    return made | {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}


def gpt_oss(draw: Any) -> dict[str, Any]:
    made = dense(draw, **_EXPERTS, sliding_window=st.sampled_from([3, 20]), layer_types=_TYPES)
    return made | {"num_local_experts": 4}


def deepseek(draw: Any, **more: st.SearchStrategy) -> dict[str, Any]:
    made = dense(
        draw,
        **BIAS,
        q_lora_rank=st.sampled_from([None, 12]),
        routed_scaling_factor=st.sampled_from([1.0, 2.5]),
        norm_topk_prob=st.booleans(),
        first_k_dense_replace=st.sampled_from([0, 1, 2]),
        **more,
    )
    del made["head_dim"]
    return {
        **made,
        "num_key_value_heads": made["num_attention_heads"],
        "kv_lora_rank": 12,
        "q_lora_rank": made.get("q_lora_rank", 12),
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": draw(st.sampled_from([8, 12])),
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "n_shared_experts": draw(st.sampled_from([1, 2])),
        "num_experts_per_tok": draw(st.sampled_from([2, 3])),
    }


def deepseek_v2(draw: Any) -> dict[str, Any]:
    made = deepseek(draw, topk_method=st.sampled_from(["greedy", "group_limited_greedy"]))
    return made | {"n_group": 4, "topk_group": draw(st.sampled_from([2, 3]))}


def deepseek_v3(draw: Any) -> dict[str, Any]:
    made = deepseek(draw, rope_interleave=rare(True, False))
    return made | draw(st.sampled_from([{"n_group": 2, "topk_group": 1}, {"n_group": 4}]))


def olmo2(draw: Any) -> dict[str, Any]:
    return dense(draw, **BIAS)


def olmo3(draw: Any) -> dict[str, Any]:
    windows = st.sampled_from([3, 20, 50])  # transformers cannot compute null
    return dense(draw, **BIAS, sliding_window=windows, layer_types=_TYPES)


def gemma2(draw: Any) -> dict[str, Any]:
    caps = {f"{name}_logit_softcapping": st.sampled_from([None, 2.0]) for name in _CAPPED}
    return dense(draw, **_GEMMA, **caps)


def gemma3(draw: Any) -> dict[str, Any]:
    return dense(
        draw,
        **_GEMMA,
        final_logit_softcapping=st.sampled_from([None, 2.0]),
        attn_logit_softcapping=rare(None, 2.0),
        sliding_window_pattern=st.sampled_from([2, 3, 6]),
        rope_local_base_freq=numbers(50, 1000),
    )


def phi3(draw: Any) -> dict[str, Any]:
    return dense(draw, sliding_window=_WINDOW, pad_token_id=st.just(0)) | {"pad_token_id": 0}


def smollm3(draw: Any) -> dict[str, Any]:
    more = {key: value for key, value in _QWEN.items() if key != "max_window_layers"}
    made = dense(
        draw,
        **more,
        **BIAS,
        mlp_bias=rare(False, True),
        layer_types=_TYPES,
        no_rope_layers=st.sampled_from([None, [1, 0, 1], [0, 0, 0, 1], [1, 1, 1]]),
        no_rope_layer_interval=st.sampled_from([1, 2, 4]),
    )
    return made | {"pad_token_id": 0}


def seed_oss(draw: Any) -> dict[str, Any]:
    return dense(
        draw,
        attention_bias=st.booleans(),
        attention_out_bias=rare(False, True),
        mlp_bias=rare(False, True),
    )


def granite(draw: Any) -> dict[str, Any]:
    return dense(
        draw,
        **BIAS,
        embedding_multiplier=numbers(0.5, 3),
        residual_multiplier=numbers(0.2, 1.5),
        logits_scaling=numbers(1, 4),
        mlp_bias=rare(False, True),
    ) | {"attention_multiplier": draw(numbers(0.05, 0.4))}
