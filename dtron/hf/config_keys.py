"""The keys of config.json: dtron's field of each key. config_defaults.py has the values of missing
keys.

A row is ``dtron's field: Hugging Face's key``; ``a|b`` if the key has two names.
"""

from __future__ import annotations

_SIZES = {
    "vocab": "vocab_size",
    "embed": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "context": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "mlp": "intermediate_size",
    "tied": "tie_word_embeddings",
}
LLAMA_KEYS = _SIZES | {"kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
MISTRAL_KEYS = LLAMA_KEYS | {"window": "sliding_window"}
_MOE = {"moe.top_k": "num_experts_per_tok", "moe.mlp": "moe_intermediate_size"}
QWEN3_MOE_KEYS = (
    LLAMA_KEYS
    | _MOE
    | {"moe.experts": "num_experts|num_local_experts", "moe.normalize": "norm_topk_prob"}
)
MIXTRAL_KEYS = MISTRAL_KEYS | {
    "moe.experts": "num_local_experts|num_experts",
    "moe.top_k": "num_experts_per_tok",
    "moe.mlp": "intermediate_size",
}
GPT_OSS_KEYS = {name: key for name, key in MIXTRAL_KEYS.items() if name != "window"}
GPT2_KEYS = {
    "vocab": "vocab_size",
    "embed": "n_embd|hidden_size",
    "layers": "n_layer|num_hidden_layers",
    "heads": "n_head|num_attention_heads",
    "context": "n_positions|max_position_embeddings",
    "norm_eps": "layer_norm_epsilon",
    "mlp": "n_inner",
    "tied": "tie_word_embeddings",
}
DEEPSEEK_KEYS = {
    **_SIZES,
    **_MOE,
    "mla.kv_rank": "kv_lora_rank",
    "mla.q_rank": "q_lora_rank",
    "mla.nope_dim": "qk_nope_head_dim",
    "mla.rope_dim": "qk_rope_head_dim",
    "mla.v_dim": "v_head_dim",
    "moe.experts": "n_routed_experts|num_experts|num_local_experts",
    "moe.dense_layers": "first_k_dense_replace",
    "moe.scale": "routed_scaling_factor",
    "moe.normalize": "norm_topk_prob",
    "moe.groups": "n_group",
    "moe.group_top_k": "topk_group",
}
DEEPSEEK_V32_KEYS = DEEPSEEK_KEYS | {
    "indexer.heads": "index_n_heads",
    "indexer.head_dim": "index_head_dim",
    "indexer.top_k": "index_topk",
}
_GEMMA_KEYS = LLAMA_KEYS | {"final_softcap": "final_logit_softcapping"}
GEMMA2_KEYS = _GEMMA_KEYS | {"softcap": "attn_logit_softcapping"}
GEMMA3_KEYS = _GEMMA_KEYS
GRANITE_KEYS = LLAMA_KEYS | {
    "attention_scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
}
GLM4_MOE_KEYS = {
    **LLAMA_KEYS,
    **{name: key for name, key in DEEPSEEK_KEYS.items() if name.startswith("moe.")},
    "moe.experts": "n_routed_experts|num_local_experts",
    "qk_norm": "use_qk_norm",
    "qkv_bias": "attention_bias",
}
MINIMAX_M2_KEYS = {name: key for name, key in MIXTRAL_KEYS.items() if name != "window"}
LLAMA4_KEYS = LLAMA_KEYS | {
    "mlp": "intermediate_size_mlp",
    "moe.mlp": "intermediate_size",
    "moe.shared": "intermediate_size",
    "moe.experts": "num_local_experts|num_experts",
    "moe.top_k": "num_experts_per_tok",
    "qk_norm": "use_qk_norm",
    "attention_temperature_floor": "floor_scale",
}
