"""Random fields of a config.json of families with a recurrent state; see hf_fields.py."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.helpers.hf_fields import BIAS, LAYERS, dense, optional, rare


def qwen3_next(draw: Any) -> dict[str, Any]:
    types = ("linear_attention", "full_attention")
    heads = draw(st.sampled_from([1, 2]))
    made = dense(
        draw,
        **BIAS,
        layer_types=st.sampled_from([None, [types[0], types[1], types[0]], [types[1]] * LAYERS]),
        full_attention_interval=st.sampled_from([2, 3]),
        norm_topk_prob=st.booleans(),
        decoder_sparse_step=rare(1, 2),
        mlp_only_layers=rare([], [0]),
    )
    return made | {
        "linear_num_key_heads": heads,
        "linear_num_value_heads": heads * draw(st.sampled_from([1, 2])),
        "linear_key_head_dim": 6,
        "linear_value_head_dim": draw(st.sampled_from([4, 6])),
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 16,
    }


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
