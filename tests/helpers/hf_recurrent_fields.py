"""Random fields of a config.json of families with a recurrent state; see hf_fields.py."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.helpers.hf_fields import BIAS, LAYERS, dense, rare


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
