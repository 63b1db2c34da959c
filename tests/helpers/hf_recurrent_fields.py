"""Random fields of a config.json of families with a recurrent state; see hf_fields.py."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.helpers.hf_fields import BIAS, LAYERS, dense, optional, rare

_TYPES = ("linear_attention", "full_attention")
_EXPERTS = {
    "num_experts": 4,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 16,
}


def qwen3_5(draw: Any, **more: st.SearchStrategy) -> dict[str, Any]:
    heads = draw(st.sampled_from([1, 2]))
    made = dense(
        draw,
        **BIAS,
        layer_types=st.sampled_from(
            [None, [_TYPES[0], _TYPES[1], _TYPES[0]], [_TYPES[1]] * LAYERS]
        ),
        full_attention_interval=st.sampled_from([2, 3]),
        **more,
    )
    return made | {
        "linear_num_key_heads": heads,
        "linear_num_value_heads": heads * draw(st.sampled_from([1, 2])),
        "linear_key_head_dim": 6,
        "linear_value_head_dim": draw(st.sampled_from([4, 6])),
    }


def qwen3_5_moe(draw: Any) -> dict[str, Any]:
    made = qwen3_5(draw)
    del made["intermediate_size"]
    return made | _EXPERTS


def qwen3_next(draw: Any) -> dict[str, Any]:
    made = qwen3_5(
        draw,
        norm_topk_prob=st.booleans(),
        decoder_sparse_step=rare(1, 2),
        mlp_only_layers=rare([], [0]),
    )
    return made | _EXPERTS


def olmo_hybrid(draw: Any) -> dict[str, Any]:
    """transformers saves the channels of queries, keys and values in three equal parts, whatever
    their numbers are. Only if these are equal, the parts have the shapes of a published folder."""
    made = dense(
        draw,
        **BIAS,
        layer_types=st.sampled_from(
            [None, [_TYPES[0], _TYPES[1], _TYPES[0]], [_TYPES[1]] * LAYERS]
        ),
        linear_allow_neg_eigval=st.booleans(),
        linear_conv_kernel_dim=st.sampled_from([2, 4]),
    )
    if made["num_attention_heads"] == made["num_key_value_heads"]:
        del made["num_key_value_heads"]
    sizes = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": draw(st.sampled_from([2, 4])),
        "linear_key_head_dim": 12,
    }
    width = {"linear_value_head_dim": 24 // sizes["linear_num_value_heads"]}
    return made | draw(st.sampled_from([sizes | width] * 4 + [sizes, {}])) | {"pad_token_id": None}


def nemotron_h(draw: Any) -> dict[str, Any]:
    kinds = ("linear_attention", "full_attention", "mlp")
    groups = draw(st.sampled_from([1, 2]))
    made = dense(draw, **BIAS, mlp_bias=rare(False, True), use_bias=rare(False, True))
    letters = st.lists(st.sampled_from("M*-"), min_size=2, max_size=4).map("".join)
    listed = {"layers_block_type": draw(st.lists(st.sampled_from(kinds), min_size=2, max_size=4))}
    written = {"hybrid_override_pattern": draw(letters)}
    del made["num_hidden_layers"]
    return (
        made
        | draw(st.sampled_from([listed, listed, written, {"layers_block_type": ["moe", "mlp"]}]))
        | draw(
            optional(
                layer_norm_epsilon=st.sampled_from([1e-5, 1e-3]),
                time_step_min=st.sampled_from([0.001, 0.3]),
                use_conv_bias=rare(True, False),
                mamba_dt_min=rare(0.001, 0.3),
                mlp_hidden_act=rare("relu2", "silu"),
            )
        )
        | {
            "mamba_num_heads": groups * draw(st.sampled_from([1, 2])),
            "mamba_head_dim": 6,
            "n_groups": groups,
            "ssm_state_size": draw(st.sampled_from([4, 6])),
            "conv_kernel": draw(st.sampled_from([2, 4])),
        }
    )


def kimi_linear(draw: Any) -> dict[str, Any]:
    kinds, mlps = ("linear_attention", "full_attention"), ("dense", "sparse")
    made = dense(
        draw,
        **BIAS,
        layer_types=st.sampled_from([[kinds[0], kinds[1], kinds[0]], [kinds[1]] * LAYERS]),
        mlp_layer_types=st.sampled_from([[mlps[0], mlps[1], mlps[1]], [mlps[1]] * LAYERS]),
        linear_attn_config=st.sampled_from(
            [
                {"head_dim": 4, "num_heads": 3, "short_conv_kernel_size": 2},
                {"kda_layers": [1, 3], "full_attn_layers": [2]},
            ]
        ),
        first_k_dense_replace=st.sampled_from([0, 2]),
        moe_renormalize=st.booleans(),
        routed_scaling_factor=st.sampled_from([1.0, 2.5]),
    )
    for key in ("head_dim", "max_position_embeddings"):
        del made[key]
    return made | {
        "model_max_length": 64,
        "num_key_value_heads": made["num_attention_heads"],
        "kv_lora_rank": 12,
        "q_lora_rank": draw(st.sampled_from([None, 12])),
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": draw(st.sampled_from([8, 12])),
        "linear_num_heads": 2,
        "linear_head_dim": 6,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_token": 2,
        "num_shared_experts": draw(st.sampled_from([1, 2])),
        "num_expert_group": draw(st.sampled_from([1, 2])),
        "pad_token_id": None,
    }
