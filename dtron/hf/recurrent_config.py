"""The keys of config.json, and the values of missing keys, of families with a recurrent state; see
config_keys.py and config_defaults.py."""

from __future__ import annotations

from dtron.hf.config_defaults import LLAMA, Defaults
from dtron.hf.config_keys import DEEPSEEK_KEYS, LLAMA_KEYS, QWEN3_MOE_KEYS

DELTA_SIZES = {
    "delta.key_heads": "linear_num_key_heads",
    "delta.value_heads": "linear_num_value_heads",
    "delta.key_dim": "linear_key_head_dim",
    "delta.value_dim": "linear_value_head_dim",
}
_DELTA_KEYS = DELTA_SIZES | {"delta.taps": "linear_conv_kernel_dim"}
QWEN3_NEXT_KEYS = (
    QWEN3_MOE_KEYS
    | _DELTA_KEYS
    | {
        "moe.experts": "num_experts",
        "moe.shared": "shared_expert_intermediate_size",
    }
)
QWEN3_NEXT: Defaults = {
    **LLAMA,
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 32_768,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": True,
    "mlp_only_layers": None,
    "decoder_sparse_step": 1,
    "layer_types": None,
    "full_attention_interval": 4,
}
QWEN3_5_KEYS = LLAMA_KEYS | _DELTA_KEYS
QWEN3_5: Defaults = {
    **{key: value for key, value in QWEN3_NEXT.items() if key in {*QWEN3_5_KEYS.values()}},
    "vocab_size": 248_320,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
    "rope_theta": 10_000.0,
    "layer_types": None,
    "full_attention_interval": 4,
}
QWEN3_5_MOE_KEYS = {
    name: key for name, key in QWEN3_NEXT_KEYS.items() if name not in ("mlp", "moe.normalize")
}
QWEN3_5_MOE: Defaults = {
    **{key: value for key, value in QWEN3_NEXT.items() if key in {*QWEN3_5_MOE_KEYS.values()}},
    "vocab_size": 248_320,
    "num_hidden_layers": 40,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "rope_theta": 10_000.0,
    "layer_types": None,
    "full_attention_interval": 4,
}

OLMO_HYBRID_KEYS = QWEN3_5_KEYS | {"delta.negative_eigenvalues": "linear_allow_neg_eigval"}
OLMO_HYBRID: Defaults = {
    **LLAMA,
    "vocab_size": 100_352,
    "hidden_size": 3840,
    "num_attention_heads": 30,
    "max_position_embeddings": 65_536,
    "linear_num_key_heads": None,
    "linear_num_value_heads": None,
    "linear_key_head_dim": None,
    "linear_value_head_dim": None,
    "linear_conv_kernel_dim": 4,
    "linear_allow_neg_eigval": True,
    "layer_types": None,
}

NEMOTRON_H_KEYS = LLAMA_KEYS | {
    "norm_eps": "layer_norm_epsilon",
    "mamba.heads": "mamba_num_heads",
    "mamba.head_dim": "mamba_head_dim",
    "mamba.groups": "n_groups|mamba_n_groups",
    "mamba.state": "ssm_state_size",
    "mamba.taps": "conv_kernel|mamba_d_conv",
    "mamba.time_step_min": "time_step_min|mamba_dt_min",
}
NEMOTRON_H: Defaults = {
    **LLAMA,
    "vocab_size": 131_072,
    "intermediate_size": 21_504,
    "num_hidden_layers": 4,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "layer_norm_epsilon": 1e-5,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 128,
    "conv_kernel": 4,
    "time_step_min": 0.001,
    "layers_block_type": None,
    "layer_types": None,
    "hybrid_override_pattern": None,
}

KIMI_LINEAR_KEYS = {
    **{name: key for name, key in DEEPSEEK_KEYS.items() if name != "moe.dense_layers"},
    "context": "model_max_length|max_position_embeddings",
    "moe.experts": "num_experts|num_local_experts",
    "moe.top_k": "num_experts_per_token|num_experts_per_tok",
    "moe.normalize": "moe_renormalize|norm_topk_prob",
    "moe.groups": "num_expert_group|n_group",
    "delta.key_heads": "linear_num_heads",
    "delta.value_heads": "linear_num_heads",
    "delta.key_dim": "linear_head_dim",
    "delta.value_dim": "linear_head_dim",
    "delta.taps": "linear_conv_kernel_dim",
}
KIMI_LINEAR: Defaults = {
    **LLAMA,
    "vocab_size": 163_840,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 27,
    "num_key_value_heads": 32,
    "model_max_length": 1_048_576,
    "max_position_embeddings": 1_048_576,
    "rms_norm_eps": 1e-5,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_shared_experts": 1,
    "moe_intermediate_size": 1024,
    "moe_renormalize": True,
    "routed_scaling_factor": 2.446,
    "num_expert_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "linear_num_heads": 32,
    "linear_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "linear_attn_config": None,
    "layer_types": None,
    "mlp_layer_types": None,
}
