"""Random fields of a config.json of families with experts; see hf_fields.py."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.helpers.hf_fields import BIAS, deepseek, dense, numbers


def deepseek_v32(draw: Any) -> dict[str, Any]:
    """With many heads of the indexer, so that no two keys have a score of 0: the choice of one of
    them is not theirs."""
    kinds = ("dense", "sparse")
    made = deepseek(
        draw,
        mlp_layer_types=st.sampled_from([None, [kinds[0], kinds[1], kinds[0]], [kinds[1]] * 3]),
        num_nextn_predict_layers=st.sampled_from([0, 1]),
    )
    made |= draw(st.sampled_from([{"n_group": 2, "topk_group": 1}, {"n_group": 4}]))
    return made | {
        "q_lora_rank": draw(st.sampled_from([12, 12, 12, None])),
        "index_n_heads": draw(st.sampled_from([16, 24])),
        "index_head_dim": draw(st.sampled_from([8, 12])),
        "index_topk": draw(st.sampled_from([1, 5, 30, 64])),
    }


def glm4_moe(draw: Any) -> dict[str, Any]:
    made = dense(
        draw,
        attention_bias=st.booleans(),
        use_qk_norm=st.booleans(),
        routed_scaling_factor=st.sampled_from([1.0, 2.5]),
        norm_topk_prob=st.booleans(),
        first_k_dense_replace=st.sampled_from([0, 1, 2]),
        num_nextn_predict_layers=st.sampled_from([0, 1]),
    )
    groups = draw(st.sampled_from([{"n_group": 2, "topk_group": 1}, {"n_group": 1}, {}]))
    return (
        made
        | groups
        | {
            "moe_intermediate_size": 16,
            "n_routed_experts": 8,
            "n_shared_experts": draw(st.sampled_from([1, 2])),
            "num_experts_per_tok": draw(st.sampled_from([2, 3])),
        }
    )


def minimax_m2(draw: Any) -> dict[str, Any]:
    made = dense(draw, rotary_dim=st.sampled_from([4, 6, 8]))
    return made | {"num_local_experts": 8, "num_experts_per_tok": draw(st.sampled_from([1, 3]))}


def llama4(draw: Any) -> dict[str, Any]:
    kinds = ("chunked_attention", "full_attention")
    made = dense(
        draw,
        **BIAS,
        use_qk_norm=st.booleans(),
        moe_layers=st.sampled_from([None, [1], [0, 2]]),
        interleave_moe_layer_step=st.sampled_from([1, 2]),
        no_rope_layers=st.sampled_from([None, [], [1, 0, 1], [0, 1, 1], [1, 1, 1]]),
        no_rope_layer_interval=st.sampled_from([1, 2, 4]),
        attention_chunk_size=st.sampled_from([None, 3, 20, 50]),
        layer_types=st.sampled_from([None, None, [kinds[0], kinds[1], kinds[0]], [kinds[0]] * 3]),
        attn_temperature_tuning=st.booleans(),
        attn_scale=numbers(0.1, 0.9),
        floor_scale=st.sampled_from([2, 9, 8192]),
    )
    experts = {"num_local_experts": 4, "num_experts_per_tok": draw(st.sampled_from([1, 2]))}
    return made | experts | {"intermediate_size": 16, "intermediate_size_mlp": 48}
